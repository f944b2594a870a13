"""An adapter's tensors on their way to a file and back: what is saved of them, and what is refused."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import FormatError, IsolateError
from .adapters import deltas_of
from .config import DeltaConfig
from .delta import all_finite
from .scale import warn_if_scaled
from .soft_mask import BUFFERS

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


def to_save(model: nn.Module, config: DeltaConfig, adapter_name: str, saved: Tensors) -> Tensors:
    """What goes into the file: zero at the holes, in `save_dtype`.

    Args:
        model: The model that has the adapter.
        config: The adapter's.
        adapter_name: Its name.
        saved: {name in the model: tensor}, what PEFT would save; on several processes gathered.

    Raises:
        IsolateError: A number does not fit into `save_dtype`, or the numbers are offloaded.
    """
    if any(value.is_meta for value in saved.values()):
        raise IsolateError(
            f"the numbers of adapter {adapter_name!r} are offloaded: bring them back, by "
            "accelerate.hooks.remove_hook_from_submodules(model), and save then"
        )
    warn_if_scaled(model, adapter_name)
    for name, delta in deltas_of(model, adapter_name).items():
        for tensor in delta.places:
            if (key := f"{name}.{tensor}") in saved:
                saved[key] = delta.zero_holes(tensor, saved[key])
    dtype = config.saved_torch_dtype
    if dtype is None:
        return saved
    masks = tuple(f".{name}" for name in BUFFERS.values())
    numbers = {key for key, value in saved.items() if value.is_floating_point() and not key.endswith(masks)}
    if not numbers:
        return saved  # a packed adapter, which is rounded already
    rounded = {key: value.to(dtype) if key in numbers else value for key, value in saved.items()}
    for key, value in rounded.items():
        if not all_finite(value) and all_finite(saved[key]):
            raise IsolateError(
                f"{key!r} does not fit into save_dtype={config.save_dtype!r}, whose largest number is "
                f"{torch.finfo(dtype).max:.3g}: use 'bfloat16' or None"
            )
    errors = [(saved[key] - rounded[key]).abs().max().item() for key in saved if saved[key].numel()]
    logger.warning(
        "the adapter %r is saved in %s: its deltas are rounded by at most %.3g", adapter_name, config.save_dtype,
        max(errors, default=0.0),
    )  # fmt: skip
    return rounded


def check_loaded(model: nn.Module, adapter_name: str, prefix: str, mapped: Tensors) -> None:
    """Refuse what stock loading would skip or take in silence. Changes nothing.

    Args:
        model: The model that has the adapter.
        adapter_name: Its name.
        prefix: The method's.
        mapped: {name in the model: tensor}, what is to be loaded.

    Raises:
        FormatError: It is not the adapter's region, holds NaN, damaged codes, or a weight of the base.
    """
    loaded = {key: value for key, value in mapped.items() if prefix in key}
    _check_beside(model, mapped.keys() - loaded.keys())
    there = {key: value for key, value in model.state_dict().items() if _is_delta_of(adapter_name, key, prefix)}
    remedy = "Load it under another name, delete the adapter first, or pass the config that was saved with the file"
    if different := sorted(there.keys() ^ loaded.keys()):
        raise FormatError(
            f"the file does not hold the region of adapter {adapter_name!r}: {different[0]!r} is only "
            f"{'in the model' if different[0] in there else 'in the file'}. {remedy}"
        )
    for key, value in loaded.items():
        # Stock loading would copy all that fits before it complains.
        if value.shape != there[key].shape:
            raise FormatError(
                f"the file does not hold the region of adapter {adapter_name!r}: {key!r} has shape "
                f"{tuple(value.shape)} in the file and {tuple(there[key].shape)} in the model. {remedy}"
            )
    for key, value in loaded.items():
        if value.is_floating_point() and not all_finite(value):
            raise FormatError(
                f"{key!r} holds NaN or infinity: the training diverged or the file is damaged; nothing was loaded"
            )
    for name, delta in deltas_of(model, adapter_name).items():
        delta.check_state({key: loaded[full] for key in delta.state if (full := f"{name}.{key}") in loaded})


def _check_beside(model: nn.Module, keys: Collection[str]) -> None:
    """Refuse a file that would overwrite the base (promise 4): PEFT loads whatever name it finds."""
    if not keys:
        return
    beside = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    there = model.state_dict().keys()
    for key in sorted(keys):
        if key not in there or any(key.startswith(f"{name}.") for name in beside):
            continue
        if key.split(".")[-2] not in EMBEDDING_LAYER_NAMES:
            raise FormatError(
                f"the file holds {key!r}, a weight of the base, which it would overwrite: no adapter of this library "
                "does; get it again from where it came"
            )
        warnings.warn(
            f"the file holds {key!r} of the base, saved by save_embedding_layers, and replaces it", UserWarning,
            stacklevel=2,
        )  # fmt: skip


def _is_delta_of(adapter_name: str, key: str, prefix: str) -> bool:
    """….<prefix><parameter>.<adapter>.<tensor>; by place, since a layer may be called what an adapter is."""
    parts = key.split(".")
    return len(parts) > 2 and parts[-3].startswith(prefix) and parts[-2] == adapter_name
