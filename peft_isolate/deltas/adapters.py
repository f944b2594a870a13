"""An adapter as a whole, over all the layers of a model: its deltas, its regions, its base."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import BaseMismatchError, IsolateError
from ..regions.fingerprint import compare, fingerprint
from ..regions.region import Region, is_plain, unwrap, walk_parameters
from .config import DeltaConfig
from .delta import HELD, TRAINED, Delta
from .layer import DeltaLayer
from .targets import trained_beside

SKIP_BASE_CHECK = "PEFT_ISOLATE_SKIP_BASE_CHECK"


def layers_of(model: nn.Module) -> dict[str, DeltaLayer]:
    """{name in the model: layer}."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DeltaLayer)}


def _deltas(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, DeltaLayer, str, Delta]]:
    for name, layer in layers_of(model).items():
        for parameter in layer.parameter_names:
            if adapter_name in (deltas := layer.deltas(parameter)):
                yield name, layer, parameter, deltas[adapter_name]


def deltas_of(model: nn.Module, adapter_name: str) -> dict[str, Delta]:
    """{name in the model: delta} of an adapter, such as "….q_proj.halfft_weight.default"."""
    return {
        f"{name}.{layer.prefix}{parameter}.{adapter_name}".replace("_fsdp_wrapped_module.", ""): delta
        for name, layer, parameter, delta in _deltas(model, adapter_name)
    }


def parameter_deltas(model: nn.Module, adapter_name: str) -> dict[str, Delta]:
    """{parameter of the base model: delta} of an adapter."""
    return {f"{name}.{parameter}": delta for name, _, parameter, delta in _deltas(unwrap(model), adapter_name)}


def regions_of(model: nn.Module, adapter_name: str) -> tuple[Region, Region]:
    """(what an adapter trains, what it holds of earlier rounds), in the names of the base model.

    Raises:
        IsolateError: The model has no such adapter.
    """
    deltas = parameter_deltas(model, adapter_name)
    if not deltas:
        known = sorted({name for layer in layers_of(model).values() for name in layer.scaling})
        raise IsolateError(f"the model has no adapter {adapter_name!r} of this library: it has {known}")
    trained, held = (
        Region({name: delta.selection(part) for name, delta in deltas.items()}) for part in (TRAINED, HELD)
    )
    return trained, held


def check_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that PEFT's filters would take for a part of the model's own names."""
    if any(adapter_name in name.split(".") for name, _, _, _ in walk_parameters(model)):
        raise IsolateError(
            f"the adapter name {adapter_name!r} is also part of a parameter's name in {type(model).__name__}, where "
            "PEFT could not tell them apart when saving: choose another, such as 'default'"
        )


def base_tensors(model: nn.Module, config: DeltaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, W0) of the base's tensors that can be compared, also where adapters are merged into them.

    Left out are quantised, sharded, offloaded and meta tensors, and what the config trains and saves whole beside the
    deltas: a new head is drawn at random each time, and so are the embeddings of new tokens, tied or not.
    """
    layer_around = {id(layer.get_base_layer()): layer for layer in layers_of(model).values()}
    beside = trained_beside(model, config)
    for name, module_name, module, parameter in walk_parameters(model):
        if parameter.is_meta or not is_plain(parameter, module) or module_name in beside:
            continue
        layer = layer_around.get(id(module))
        yield name, parameter if layer is None else layer.base_parameter(name.rpartition(".")[2])


def fingerprint_of(model: nn.Module, config: DeltaConfig) -> str | None:
    """The base's fingerprint; None where none of its numbers are here."""
    tensors = list(base_tensors(model, config))
    return fingerprint(tensors) if tensors else None


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
    try:
        compared = compare(recorded, base_tensors(model, config))
    except BaseMismatchError as error:
        if os.environ.get(SKIP_BASE_CHECK, "") in ("", "0"):
            raise
        warnings.warn(f"{error} [it was skipped]", UserWarning, stacklevel=2)
        return
    total = sum(1 for _ in walk_parameters(model))
    if compared < total / 2:
        warnings.warn(
            f"only {compared} of {total} tensors of the base could be compared with the adapter's fingerprint (the "
            "others are quantised, offloaded or on the meta device): whether this is its base was not fully checked",
            UserWarning,
            stacklevel=2,
        )
