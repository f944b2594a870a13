"""Several processes: what has to agree between them, and what cannot work."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping

import torch.distributed as dist
from accelerate.state import AcceleratorState

from ..errors import IsolateError
from ..regions.fingerprint import as_bytes
from ..regions.stored import BY_ELEMENTS, Place
from .delta import Delta


def check_same_everywhere(deltas: Mapping[str, Delta]) -> None:
    """Compare where deltas stand between all processes, by digests. Every process must call it.

    Raises:
        IsolateError: They differ: another selection, or other positions. On every process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    mine = {name: _digest(delta) for name, delta in deltas.items()}
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):
        digests = [theirs.get(name, "none") for theirs in everyone]
        if len(set(digests)) > 1:
            raise IsolateError(
                f"the processes have different regions, first at {name!r} (digests {digests}): give every process the "
                "same config, and a region that is no function of the config the same file"
            )


def _digest(delta: Delta) -> str:
    digest = hashlib.sha256()
    for name, place in delta.places.items():
        digest.update(json.dumps([name, place.to_dict()]).encode())
    for _, tensor in sorted(delta.state.items()):
        digest.update(as_bytes(tensor))
    return digest.hexdigest()[:16]


def check_loading(places: Iterable[Place], masked: bool = False, packed: str | None = None) -> None:
    """Refuse FSDP's loading on one process where positions of elements, a soft mask or a packed adapter would have to
    be sent around.

    accelerate broadcasts every persistent buffer as if it were sharded, and fails on them with an AttributeError.

    Raises:
        IsolateError: With the remedy.
    """
    causes = (
        (packed, "the adapter is packed into bytes, which", "unpack it (`peft-isolate decompress`)"),
        (
            any(place.kind in BY_ELEMENTS for place in places),
            "the region goes by single elements, whose positions",
            "choose whole parameters, rows or columns",
        ),
        (masked, "the config has a soft mask, whose importances", "leave the importance out"),
    )
    for there, what, instead in causes:
        if there and _loads_on_one_process():
            raise IsolateError(
                f"{what} accelerate cannot broadcast while FSDP loads on one process: set "
                f"fsdp_cpu_ram_efficient_loading to false (FSDP_CPU_RAM_EFFICIENT_LOADING=false), or {instead}"
            )


def _loads_on_one_process() -> bool:
    """Whether FSDP with cpu_ram_efficient_loading is on: by accelerate's plugin, or by its environment variables."""
    plugin = AcceleratorState._shared_state.get("fsdp_plugin") if AcceleratorState._shared_state else None
    if plugin is not None:
        return bool(plugin.cpu_ram_efficient_loading)
    on = ("1", "true", "yes", "y", "t", "on")
    variables = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    return all(os.environ.get(name, "").lower() in on for name in variables)
