"""The base an adapter was trained on: its fingerprint, and whether the model at hand is it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import nn

from ..errors import BaseMismatchError
from ..regions.fingerprint import compare, fingerprint
from ..regions.region import PLAIN_DTYPES, is_plain, walk_parameters
from .adapters import layers_of
from .config import DeltaConfig
from .targets import trained_beside

SKIP_BASE_CHECK = "PEFT_ISOLATE_SKIP_BASE_CHECK"


def base_tensors(model: nn.Module, config: DeltaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, W0) of the base's tensors that can be compared, also where adapters are merged into them.

    Left out are quantised, offloaded and meta tensors, and what the config trains and saves whole beside the deltas: a
    new head is drawn at random each time, and so are the embeddings of new tokens, tied or not. What ZeRO-3 has
    sharded is gathered, one tensor at a time and until the next one is asked for: every process must ask.
    """
    layer_around = {id(layer.get_base_layer()): layer for layer in layers_of(model).values()}
    beside = trained_beside(model, config)
    for name, module_name, module, parameter in walk_parameters(model):
        gathered = _is_gathered(parameter)
        if parameter.is_meta or not (gathered or is_plain(parameter, module)) or module_name in beside:
            continue
        layer = layer_around.get(id(module))
        with _whole(parameter) if gathered else nullcontext():
            yield name, parameter if layer is None else layer.base_parameter(name.rpartition(".")[2])


def _is_gathered(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has sharded it, and can bring its plain numbers together."""
    return hasattr(parameter, "ds_id") and hasattr(parameter, "all_gather") and parameter.dtype in PLAIN_DTYPES


def _whole(parameter: nn.Parameter) -> AbstractContextManager[None]:
    """ZeRO-3's parameter with all its numbers, on every process."""
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[None] = GatheredParameters([parameter])
    return context


def fingerprint_of(model: nn.Module, config: DeltaConfig) -> str | None:
    """The base's fingerprint; None where none of its numbers are here."""
    tensors = base_tensors(model, config)
    first = next(tensors, None)
    return None if first is None else fingerprint(chain([first], tensors))


def compare_base(recorded: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> int | None:
    """As `regions.fingerprint.compare`, unless the user has asked to go on with another base: then None."""
    try:
        return compare(
            recorded, tensors,
            f", or use a fresh config (resolved=None) for a new adapter; {SKIP_BASE_CHECK}=1 makes this a warning",
        )  # fmt: skip
    except BaseMismatchError as error:
        if os.environ.get(SKIP_BASE_CHECK, "") in ("", "0"):
            raise
        warnings.warn(f"{error} [it was skipped]", UserWarning, stacklevel=3)
        return None


def check_base(model: nn.Module, config: DeltaConfig) -> None:
    """Compare the base with the fingerprint that the config carries.

    Raises:
        BaseMismatchError: It is another one.
    """
    recorded = (config.resolved or {}).get("base")
    if recorded is None:
        warnings.warn(
            "the adapter carries no fingerprint of its base (it was made on a model without numbers): whether this is "
            "its base was not checked",
            UserWarning,
            stacklevel=2,
        )
        return
    compared = compare_base(recorded, base_tensors(model, config))
    if compared is None:
        return
    total = sum(1 for _ in walk_parameters(model))
    if compared < total / 2:
        warnings.warn(
            f"only {compared} of {total} tensors of the base could be compared with the adapter's fingerprint (the "
            "others are quantised, offloaded or on the meta device): whether this is its base was not fully checked",
            UserWarning,
            stacklevel=2,
        )
