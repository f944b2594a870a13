"""PEFT's own rules for which modules a config names: `target_modules`, `exclude_modules`, layers, parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from ..regions.region import unwrap, walk_parameters
from ..regions.roles import Role

if TYPE_CHECKING:
    from .config import DeltaConfig


def is_excluded(config: DeltaConfig, module_name: str) -> bool:
    """Whether PEFT takes the module away again: `exclude_modules`, `modules_to_save`."""
    probe: Any = copy.copy(config)
    probe.target_modules, probe.layers_to_transform = {module_name}, None
    return isinstance(check_target_module_exists(probe, module_name), _ExcludedModule)


def in_layers(config: DeltaConfig, role: Role) -> bool:
    """Whether `layers_to_transform` and `layers_pattern` let a parameter be, when its role made it a candidate."""
    layers, patterns = config.layers_to_transform, config.layers_pattern
    if layers is None or layers == []:
        return True
    if patterns and role.stack.rpartition(".")[2] not in ([patterns] if isinstance(patterns, str) else patterns):
        return False
    return role.layer in ([layers] if isinstance(layers, int) else layers)


def targeted_parameters(model: nn.Module, config: DeltaConfig) -> set[str]:
    """Names of the parameters that `target_modules` (all of a module's own) and `target_parameters` name."""
    model, config = unwrap(model), copy.copy(config)
    found: set[str] = set()
    if config.target_modules is not None:
        config = _maybe_include_all_linear_layers(config, model)
        matches: dict[str, bool] = {}
        for name, module_name, _, _ in walk_parameters(model):
            if module_name not in matches:
                matches[module_name] = bool(check_target_module_exists(config, module_name))
            if matches[module_name]:
                found.add(name)
    for wanted in config.target_parameters or ():
        found |= {name for name, *_ in walk_parameters(model) if name == wanted or name.endswith(f".{wanted}")}
    return found


def tied_names(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """{parameter: the other names under which the model uses the same tensor}, for those that have any."""
    wanted = set(names)
    names_of: dict[int, list[str]] = {}
    for name, _, _, parameter in walk_parameters(model, tied=True):
        names_of.setdefault(id(parameter), []).append(name)
    return {first: others for first, *others in names_of.values() if others and first in wanted}
