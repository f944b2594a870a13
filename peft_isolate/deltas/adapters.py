"""An adapter as a whole, over all the layers of a model: its deltas, its regions, another arrangement of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import IsolateError, RegionError
from ..regions.region import Region, unwrap
from .config import DeltaConfig
from .delta import HELD, TRAINED, Delta
from .layer import DeltaLayer
from .packed import inference_only
from .soft_mask import SoftMask
from .terms import as_finite

if TYPE_CHECKING:
    from .tuner import DeltaTuner

# What FSDP and its activation checkpointing put into modules' names, and leave out of state dicts.
_NOT_IN_STATE_DICTS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def name_in_state_dict(name: str) -> str:
    """The name that a state dict has for a module or parameter, which FSDP may have put another into."""
    for wrapper in _NOT_IN_STATE_DICTS:
        name = name.replace(wrapper, "")
    return name


def layers_of(model: nn.Module) -> dict[str, DeltaLayer]:
    """{name in the model: layer}."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DeltaLayer)}


def _deltas(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, DeltaLayer, str, Delta]]:
    for name, layer in layers_of(model).items():
        for parameter in layer.parameter_names:
            if adapter_name in (deltas := layer.deltas(parameter)):
                yield name, layer, parameter, deltas[adapter_name]


def deltas_of(model: nn.Module, adapter_name: str) -> dict[str, Delta]:
    """{name in the model's state dict: delta} of an adapter, such as "….q_proj.halfft_weight.default"."""
    return {
        f"{name_in_state_dict(name)}.{layer.prefix}{parameter}.{adapter_name}": delta
        for name, layer, parameter, delta in _deltas(model, adapter_name)
    }


def parameter_deltas(model: nn.Module, adapter_name: str) -> dict[str, Delta]:
    """{parameter of the base model: delta} of an adapter."""
    return {f"{name}.{parameter}": delta for name, _, parameter, delta in _deltas(unwrap(model), adapter_name)}


def tuner_of(model: nn.Module) -> DeltaTuner:
    """The tuner of a PeftModel of this library.

    Raises:
        IsolateError: It is no such model.
    """
    from .tuner import DeltaTuner

    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, DeltaTuner):
        if other := other_method(model):
            raise IsolateError(
                f"the model is no PeftModel with an adapter of this library: it has {other}, whose numbers are left "
                "alone here; wrap its base by get_peft_model with a config of this library, such as HalfFTConfig"
            )
        raise IsolateError(
            f"{type(model).__name__} is no PeftModel with an adapter of this library: wrap it by get_peft_model, or "
            "load its adapter by PeftModel.from_pretrained"
        )
    return tuner


def other_method(model: Any) -> str:
    """What another PEFT method made of a model, such as "LoRA", for a message; "" where there is none."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    others = [m for m in modules if isinstance(m, BaseTunerLayer) and not isinstance(m, DeltaLayer)]
    if any(isinstance(module, LoraLayer) for module in others):
        return "LoRA"
    return f"another PEFT method's {type(others[0]).__name__}" if others else ""


def config_of(tuner: DeltaTuner, adapter_name: str) -> DeltaConfig:
    """The config of an adapter. Raises `IsolateError` where there is none of this name."""
    config = tuner.peft_config.get(adapter_name)
    if config is None:
        raise IsolateError(f"the model has no adapter {adapter_name!r}: it has {list(tuner.peft_config)}")
    return config


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


def resolved_regions(model: nn.Module, config: DeltaConfig) -> tuple[Region, Region, dict[str, SoftMask]]:
    """(trained, held, masks) of a config on a model, whether or not it was used: see `DeltaConfig.resolve`.

    Which single elements a loaded config means stands in the adapter that it was loaded with: that is asked, where the
    model has it.
    """
    resolved = config.resolve(model)
    for name, of_adapter in getattr(model, "peft_config", {}).items():
        if of_adapter is config and not resolved.is_complete:
            return *regions_of(model, name), resolved.masks
    return resolved.region, resolved.held_region, resolved.masks


def rearrange(tuner: DeltaTuner, adapter_name: str, trained: Region, held: Region, **fields: Any) -> None:
    """Give an adapter another trained region and hold the rest of it; every number stays where it is.

    The adapter gets new parameters, so an optimizer of the old ones trains nothing any more, and a config of its
    own: adapters that were made from the old one keep it. All or nothing: whatever stops it (no memory, Ctrl-C), the
    adapter is the old one, parameter for parameter. That takes the memory of both until the new one is complete.

    Args:
        tuner: Of the model.
        adapter_name: The adapter.
        trained: What shall learn from now on; numbers that are there go on, others begin at zero.
        held: What shall stay as it is. No scalar of `trained`, and with it all of the adapter's support.
        **fields: Of the config, to be changed.

    Raises:
        IsolateError: Adapters are merged or disabled, or this one is packed.
        RegionError: A region does not fit, the two overlap, or numbers of the adapter would be lost.
    """
    if any(layer.disable_adapters for layer in layers_of(tuner.model).values()):
        raise IsolateError(
            "adapters are disabled, and the layers to be wrapped would not be: enable_adapter_layers() first"
        )
    before = tuner.peft_config[adapter_name]
    if before.packed is not None:
        raise inference_only(f"the adapter {adapter_name!r}")
    learned, left = regions_of(tuner.model, adapter_name)
    if lost := (learned | left) - (trained | held):
        raise RegionError(f"{lost!r} of the adapter {adapter_name!r} is in neither region: hold it")
    if both := trained & held:
        raise RegionError(f"{both!r} cannot learn and be held at once: leave it out of one of the two")
    config = copy.copy(before)
    for name, value in fields.items():
        setattr(config, name, value)
    config.record(trained, tuner.model, (before.resolved or {}).get("base"), held)
    numbers = parameter_deltas(tuner.model, adapter_name)
    dtype = next(iter(numbers.values())).dtype
    scale = next(layer.scaling[adapter_name] for _, layer, _, _ in _deltas(tuner.model, adapter_name))
    wrapped = [layer for layer in layers_of(tuner.model).values() if adapter_name in layer.scaling]
    with _all_or_nothing(tuner):
        _add(tuner, adapter_name, config)
        for name, delta in parameter_deltas(tuner.model, adapter_name).items():
            if name in numbers:
                delta.cast(numbers[name].dtype)
                delta.fill(numbers[name].dense())
            else:
                delta.cast(dtype)
        for layer in layers_of(tuner.model).values():
            if adapter_name in layer.scaling and layer not in wrapped:
                layer.scaling[adapter_name] = scale
            # In the order the adapters were added, not in that of their rounds.
            layer.scaling = {name: layer.scaling[name] for name in tuner.peft_config if name in layer.scaling}


def add_weighted(tuner: DeltaTuner, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """See `DeltaTuner.add_weighted_adapter`."""
    if len(adapters) != len(weights) or not adapters:
        raise IsolateError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each")
    if adapter_name in tuner.peft_config:
        raise IsolateError(f"there is an adapter {adapter_name!r} already: choose another name")
    for name in adapters:
        if name not in tuner.peft_config:
            raise IsolateError(f"there is no adapter {name!r} to combine: there are {list(tuner.peft_config)}")
        for beside in ("modules_to_save", "trainable_token_indices"):
            if value := getattr(tuner.peft_config[name], beside):
                raise IsolateError(
                    f"{name!r} has {beside}={value!r}, which no sum of deltas has: combine adapters without, or merge "
                    "them one after the other"
                )
    for name, weight in zip(adapters, weights, strict=True):
        if as_finite(weight) is None:
            raise IsolateError(f"the weight of {name!r} must be a finite number, got {weight!r}")
    union = Region()
    for name in adapters:
        trained, held = regions_of(tuner.model, name)
        union = union | trained | held
    config = copy.copy(tuner.peft_config[adapters[0]])
    config.packed = None
    config.record(union, tuner.model, (config.resolved or {}).get("base"))
    scaling = {name: scale for layer in layers_of(tuner.model).values() for name, scale in layer.scaling.items()}
    terms = [
        (parameter_deltas(tuner.model, name), float(weight) * scaling[name])
        for name, weight in zip(adapters, weights, strict=True)
    ]
    with _all_or_nothing(tuner):
        _add(tuner, adapter_name, config)
        for parameter, delta in parameter_deltas(tuner.model, adapter_name).items():
            parts = [each[parameter].dense().to(delta.delta) * factor for each, factor in terms if parameter in each]
            delta.fill(torch.stack(parts).sum(0))


def _add(tuner: DeltaTuner, adapter_name: str, config: DeltaConfig) -> None:
    """Inject under this config."""
    for delta in (module for module in tuner.model.modules() if isinstance(module, Delta)):
        delta.check_here()  # else the numbers to be moved would be lost half-way
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)


@contextmanager
def _all_or_nothing(tuner: DeltaTuner) -> Iterator[None]:
    """Whatever is raised in here, the model has its old modules, parameters and configs afterwards.

    What is kept for that are references, no copies: a delta that is replaced in here lives on until the end, since
    where memory ran out or a second Ctrl-C waits, nothing could be computed back from the new one. So no number of a
    module that is there already may be written in here.
    """
    modules = list(tuner.model.modules())
    children = [(module._modules, dict(module._modules)) for module in modules]
    active = [(module, module._active_adapter) for module in modules if "_active_adapter" in vars(module)]
    layers = [(layer, layer.adapter_layer_names, dict(layer.scaling)) for layer in layers_of(tuner.model).values()]
    learns = [(parameter, parameter.requires_grad) for parameter in tuner.model.parameters()]
    configs, tuner_active = dict(tuner.peft_config), tuner.active_adapter
    targeted = [(names, list(names)) for names in (tuner.targeted_module_names, tuner.targeted_parameter_names)]
    try:
        yield
    except BaseException:
        for of_module, then in (*children, (tuner.peft_config, configs)):
            of_module.clear()
            of_module.update(then)
        for layer, containers, scaling in layers:
            layer.adapter_layer_names, layer.scaling = containers, scaling
        for module, names in active:
            module._active_adapter = names
        for parameter, learned in learns:
            parameter.requires_grad_(learned)
        for names, then_targeted in targeted:
            names[:] = then_targeted
        tuner.active_adapter = tuner_active
        raise
