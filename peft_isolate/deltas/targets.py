"""PEFT's own rules for which modules a config names: `target_modules`, `exclude_modules`, layers, parameters."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from ..errors import IsolateError, RegionError
from ..regions.region import base_module, declared_ties, unwrap, walk_parameters
from ..regions.roles import Role, roles

if TYPE_CHECKING:
    from .config import DeltaConfig

# Heads that are new and random where a task asks for them, as PEFT names them.
NEW_HEADS = ("classifier", "score")


def is_excluded(config: DeltaConfig, module_name: str) -> bool:
    """Whether PEFT takes the module away again: `exclude_modules`, `modules_to_save`."""
    probe: Any = copy.copy(config)
    probe.target_modules, probe.layers_to_transform = {module_name}, None
    return isinstance(check_target_module_exists(probe, module_name), _ExcludedModule)


def in_layers(config: DeltaConfig, role: Role) -> bool:
    """Whether `layers_to_transform` and `layers_pattern` let a parameter be, when its role made it a candidate."""
    layers = config.layers_to_transform
    return layers is None or (
        in_stack(config, role) and role.layer in ([layers] if isinstance(layers, int) else layers)
    )


def in_stack(config: DeltaConfig, role: Role) -> bool:
    """Whether a parameter stands in the list of layers that `layers_pattern` names, as PEFT reads it; else in any."""
    patterns = config.layers_pattern
    if not patterns:
        return role.layer is not None
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(re.fullmatch(rf"(.*\.)?({pattern})", role.stack) for pattern in patterns)


def candidates(model: nn.Module, config: DeltaConfig) -> list[Role]:
    """Every parameter that a method may choose: all of the model, without its biases where `train_bias` is off.

    Raises:
        RegionError: `layers_to_transform` names a layer that the model lacks.
    """
    # A fused bias has its matrix's name in its own: in_proj_bias, down_proj_bias.
    every = [role for role in roles(model) if config.train_bias or not role.parameter.endswith((".bias", "_bias"))]
    wanted = config.layers_to_transform
    there = {role.layer for role in every if in_stack(config, role) and (config.names_its_pool or not role.tower)}
    missing = set() if wanted is None else ({wanted} if isinstance(wanted, int) else set(wanted)) - there
    if missing:
        stacks = sorted({role.stack for role in every if role.layer is not None})
        raise RegionError(
            f"layers_to_transform={wanted!r}, layers_pattern={config.layers_pattern!r}: there is no layer "
            f"{sorted(missing)} in this model, which has "
            + (f"{len(there)} (0 to {len(there) - 1})" if there else f"its layers in {stacks}")
        )
    return every


def targeted_parameters(model: nn.Module, config: DeltaConfig) -> set[str]:
    """Names of the parameters that `target_modules` (all of a module's own) and `target_parameters` name.

    A tied parameter goes by its first name, whichever of its modules is meant.
    """
    model, config = unwrap(model), copy.copy(config)
    if config.target_modules is not None:
        config = _maybe_include_all_linear_layers(config, model)
    found: set[str] = set()
    matches: dict[str, bool] = {}
    first: dict[int, str] = {}
    inside: set[str] | None = None
    if config.target_parameters and config.layers_to_transform is not None:  # which PEFT asks of modules alone
        inside = {role.parameter for role in roles(model) if in_layers(config, role)}
    for name, module_name, _, parameter in walk_parameters(model, tied=True):
        first.setdefault(id(parameter), name)
        if module_name not in matches:
            named = config.target_modules is not None
            matches[module_name] = named and bool(check_target_module_exists(config, module_name))
        if matches[module_name] or (is_targeted_parameter(config, name) and (inside is None or name in inside)):
            found.add(first[id(parameter)])
    return found


def is_targeted_parameter(config: DeltaConfig, name: str) -> bool:
    """Whether `target_parameters` names this parameter, in full or by its end."""
    return any(name == wanted or name.endswith(f".{wanted}") for wanted in config.target_parameters or ())


def token_modules(model: nn.Module, config: DeltaConfig) -> dict[str, int]:
    """{module: rows that `trainable_token_indices` trains of it}."""
    tokens = config.trainable_token_indices
    if not tokens:
        return {}
    model = unwrap(model)
    names = dict.fromkeys(module for _, module, _, _ in walk_parameters(model))
    if isinstance(tokens, dict):
        return {name: len(rows) for name in names for end, rows in tokens.items() if f".{name}".endswith(f".{end}")}
    if not hasattr(model, "get_input_embeddings"):
        raise IsolateError(
            f"trainable_token_indices={tokens!r}: {type(model).__name__} does not say which its embeddings are: pass "
            "{name of the module: rows}"
        )
    embedding = base_module(model.get_input_embeddings())  # type: ignore[operator]  # PEFT asks for it, too
    return {module: len(tokens) for _, module, held, _ in walk_parameters(model) if held is embedding}


def saved_modules(config: DeltaConfig) -> list[str]:
    """`modules_to_save`, with the heads that PEFT adds to them for a task's model."""
    heads = NEW_HEADS if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else ()
    return list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))


def trained_beside(model: nn.Module, config: DeltaConfig) -> set[str]:
    """Modules whose numbers are no part of the base: `modules_to_save`; where tokens are new, embeddings and head."""
    modules = {name: module for _, name, module, _ in walk_parameters(model)}
    found = {name for name in modules if any(f".{end}." in f".{name}." for end in saved_modules(config))}
    found |= token_modules(model, config).keys()
    if not found:
        return found  # and no roles: they take as long as comparing the base
    embeddings = {r.module for r in roles(model) if r.layer is None and r.name in ("embedding", "head")}
    return found | embeddings if found & embeddings else found


def check_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that PEFT's filters would take for a part of the model's own names, or torch for its own."""
    if not adapter_name or "." in adapter_name:
        raise IsolateError(
            f"the adapter name {adapter_name!r} is empty or has a dot, which torch's names of modules cannot have: "
            "choose another, such as 'default'"
        )
    if hasattr(nn.ModuleDict, adapter_name):
        raise IsolateError(
            f"the adapter name {adapter_name!r} is an attribute of torch's modules, which keep adapters by name: "
            "choose another, such as 'default'"
        )
    if any(adapter_name in name.split(".") for name, _, _, _ in walk_parameters(model)):
        raise IsolateError(
            f"the adapter name {adapter_name!r} is also part of a parameter's name in {type(model).__name__}, where "
            "PEFT could not tell them apart when saving: choose another, such as 'default'"
        )


def tied_names(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """{parameter: the other names under which the model uses the same numbers}, for those that have any."""
    wanted = set(names)
    ties, keys = declared_ties(model), dict[str, Any]()
    names_of: dict[Any, list[str]] = {}
    for name, _, _, parameter in walk_parameters(model, tied=True):
        # Two parameters can share one storage without being one object. On the meta device none has a storage.
        # Nor has a quantised tensor of a class of its own.
        alone = parameter.is_meta or parameter.numel() == 0 or type(parameter) is not nn.Parameter
        key = id(parameter) if alone else (parameter.data_ptr(), parameter.shape, parameter.stride())
        keys[name] = keys.get(ties.get(name, ""), key) if parameter.is_meta else key
        names_of.setdefault(keys[name], []).append(name)
    return {first: others for first, *others in names_of.values() if others and first in wanted}
