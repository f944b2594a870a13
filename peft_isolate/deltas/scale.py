"""The dial: α in `W0 + α·Δ`, set after training, in every layer of a model or in none."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import IsolateError
from .adapters import layers_of, other_method
from .layer import DeltaLayer
from .terms import as_finite

# Whose code a user does not look at when a warning points there.
_LIBRARIES = ("accelerate", "contextlib", "peft", "peft_isolate", "torch", "transformers", "trl")


def set_scale(model: nn.Module, alpha: float, adapter_name: str = "default") -> None:
    """Let the model compute with `W0 + α·Δ`: between the base and the tuned model without training again.

    Exact at both ends: α = 0 leaves the adapter out, so that alone it gives the base bit for bit; α = 1 multiplies
    nothing. Anywhere else the composed weights are those of `merge(…, scale=α)` and of `merge_adapter()` at that α,
    bit for bit. Only a number per layer is written: it costs nothing, and can be set again at any time. Of several
    active adapters each has its own α.

    It is of run time and not saved: `merge(base, adapter, out=…, scale=α)` writes the model, and saving an adapter at
    another α than 1 warns. Loading a file into an adapter that is there, under its name, leaves its α where it is, as
    PEFT's LoRA does.

    Args:
        model: Has the adapter: a PeftModel, or a transformers model that loaded it; also wrapped or compiled.
        alpha: Any finite number. Above 1 goes beyond the tuned model, below 0 away from it.
        adapter_name: The adapter.

    Raises:
        IsolateError: There is no such adapter of this library, it is merged, α is no finite number, or the adapter
            carries modules or tokens whole, of which there is no part: then α = 1 only. Nothing was changed.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_isolate import HalfFTConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), HalfFTConfig(target_modules=["0"]))
        >>> set_scale(model, 0.9)
    """
    found = as_alpha(alpha)
    for layer in layers_to_scale(model, found, adapter_name):
        layer.set_scale(adapter_name, found)


def as_alpha(alpha: Any) -> float:
    """A finite number as Python's own; others raise `IsolateError`."""
    if (found := as_finite(alpha)) is not None:
        return found
    raise IsolateError(f"alpha={alpha!r}: use a finite number; 0 leaves the adapter out, 1 is the adapter as trained")


def layers_to_scale(model: nn.Module, alpha: float, adapter_name: str) -> list[DeltaLayer]:
    """The layers that have the adapter, if each of them can take this α. Raises as `set_scale` does."""
    if not isinstance(model, nn.Module):
        raise IsolateError(f"{model!r} is no model: pass the one that has the adapter {adapter_name!r}")
    layers = {name: layer for name, layer in layers_of(model).items() if adapter_name in layer.scaling}
    if not layers:
        raise _no_adapter(model, adapter_name)
    for name, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise IsolateError(
                f"the scale of {adapter_name!r} cannot become {alpha} while the adapter is merged (as in {name!r}): "
                "call unmerge_adapter() first"
            )
    if alpha != 1.0 and (whole := next(_carried_whole(model, adapter_name), None)):
        raise IsolateError(
            f"{adapter_name!r} carries {whole!r} whole (modules_to_save, trained tokens), which has no scale {alpha}: "
            "leave it at 1; for the base disable the adapter (model.disable_adapter())"
        )
    return list(layers.values())


def scale_of(model: nn.Module, adapter_name: str) -> dict[DeltaLayer, float]:
    """{layer: α of an adapter in it}, for the layers that have the adapter."""
    return {layer: layer.scaling[adapter_name] for layer in layers_of(model).values() if adapter_name in layer.scaling}


def warn_if_scaled(model: nn.Module, adapter_name: str) -> None:
    """Where an adapter is saved at another α than 1, which is lost."""
    scales = set(scale_of(model, adapter_name).values())
    if scales - {1.0}:
        shown = ", ".join(f"{scale:g}" for scale in sorted(scales))
        warnings.warn(
            f"the adapter {adapter_name!r} is saved without its scale α = {shown}, which is of run time only: load it "
            "and set_scale(model, α) again, or keep the scaled model by merge(base, adapter, out=…, scale=α)",
            UserWarning,
            stacklevel=_level_of_caller(),
        )


def _level_of_caller() -> int:
    """The `stacklevel`, for who calls this, of the first caller outside of the libraries.

    PEFT, transformers and trainers ask for what is saved through different numbers of calls.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level


def _no_adapter(model: nn.Module, adapter_name: str) -> IsolateError:
    """Says what the model has instead."""
    known = sorted({name for layer in layers_of(model).values() for name in layer.scaling})
    if known:
        return IsolateError(f"the model has no adapter {adapter_name!r} of this library: it has {known}")
    other = other_method(model)
    if other == "LoRA":
        return IsolateError(
            f"{adapter_name!r} is no adapter of this library, and the model has LoRA: PEFT dials that by `with "
            "peft.helpers.rescale_adapter_scale(model, α):`"
        )
    if other:
        return IsolateError(
            f"{adapter_name!r} is no adapter of this library, and the model has {other}: its own set_scale may do "
            "what you want"
        )
    return IsolateError(
        f"{type(model).__name__} has no adapter of this library: wrap it by get_peft_model, or load its adapter by "
        "PeftModel.from_pretrained"
    )


def _carried_whole(model: nn.Module, adapter_name: str) -> Iterator[str]:
    """The modules of which an adapter has a copy, or rows."""
    for name, module in model.named_modules():
        beside = isinstance(module, AuxiliaryTrainingWrapper)
        if beside and any(adapter_name in key.split(".") for key, _ in module.named_parameters()):
            yield name
