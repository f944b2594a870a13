"""How far CoFiTune's region moves: importances of units as soft masks (arXiv 2404.10306, section 3.2)."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...deltas.soft_mask import Axis, Damps, SoftMask, units_on
from ...errors import IsolateError
from ...regions.fused import is_transposed, n_fused_experts
from ...regions.region import Region, walk_parameters
from ...regions.roles import Role, roles
from .importance import Importance


def soft_masks(model: nn.Module, region: Region, importance: Importance, damps: Damps) -> dict[str, SoftMask]:
    """{parameter: soft mask} for what a region has of up and down, and of q, k and v by their heads.

    A head of k and v counts as much as the most important of the query heads that share it. The gate and the output
    projection are never damped; a bias is damped as its matrix.

    Args:
        model: The base model.
        region: What learns: whole parameters, or some of their output units.
        importance: Measured on this model, or on another state of it.
        damps: What is scaled, see `SoftMask`.

    Raises:
        IsolateError: The importance is another model's: layers are missing, units too many, or of other numbers.
    """
    every = [role for role in roles(model) if Importance.key_of(role) is not None]
    _check_keys(every, importance, region)
    modules = {name: module for name, _, module, _ in walk_parameters(model)}
    axes: dict[str, Axis] = {
        role.parameter: "columns"
        if len(role.selection.shape) == 1 or isinstance(modules[role.parameter], Conv1D)
        else "rows"
        for role in every
    }
    query_units = {
        Importance.key_of(role): units_on(role.selection, axes[role.parameter]) for role in every if role.name == "q"
    }
    of_parameter: dict[str, torch.Tensor] = {}
    free = []
    for role in every:
        key, axis = Importance.key_of(role), axes[role.parameter]
        if role.parameter not in region:
            continue
        # The units of an expert that lies transposed beside others are neither rows nor columns of the whole tensor.
        across = n_fused_experts(modules[role.parameter]) and is_transposed(modules[role.parameter])
        n_units = None if across else units_on(role.selection, axis)
        if key not in importance.units or n_units is None:
            free.append(role)
            continue
        units = importance.units[key]
        if role.expert is not None:
            units = units[role.expert] if role.expert < len(units) else units[:0]
        if role.name in ("q", "k", "v"):
            units = _by_head(units, n_units, query_units[key] or 0)
        if units.numel() != n_units:
            raise IsolateError(
                f"the importance {key!r} is of shape {tuple(importance.units[key].shape)}, and {role.parameter!r} has "
                f"{n_units} output units: it was measured on another model; measure it on this one"
            )
        rows, columns = role.selection.matrix_shape
        block = slice(None) if role.selection.kind == "whole" else role.selection.indices
        of_parameter.setdefault(role.parameter, torch.zeros(rows if axis == "rows" else columns))[block] = units
    if free:
        warnings.warn(
            f"the soft mask does not reach {sorted({role.parameter for role in free})}: they were not measured, or "
            "their units do not lie in rows of their own; they learn undamped",
            UserWarning,
            stacklevel=2,
        )
    masks = {}
    for name, units in of_parameter.items():
        selection = region[name]
        chosen = units if selection.kind == "whole" else units[selection.indices]
        if chosen.any():
            masks[name] = SoftMask(axes[name], damps, chosen.numel(), chosen.contiguous())
    return masks


def _by_head(heads: torch.Tensor, n_units: int, n_query_units: int) -> torch.Tensor:
    """(heads,) -> (n_units,): what each unit of q, or of k and v, shares with its head; empty where it cannot be."""
    if heads.ndim != 1 or not n_query_units or n_query_units % heads.numel():
        return heads[:0]
    width = n_query_units // heads.numel()
    n_heads = n_units // width
    if n_units % width or heads.numel() % n_heads:
        return heads[:0]
    return heads.reshape(n_heads, -1).amax(1).repeat_interleave(width)


def _check_keys(every: list[Role], importance: Importance, region: Region) -> None:
    """Single modules of a layer may not have been measured (`measure_importance` has said so), whole layers are."""
    known = {Importance.key_of(role) for role in every}
    measured = {tuple(key.rsplit(".", 3)[:2]) for key in importance.units}
    wanted = {(role.stack, str(role.layer)) for role in every if role.parameter in region}
    alone = [*sorted(importance.units.keys() - known), *sorted(".".join(layer) for layer in wanted - measured)]
    if alone:
        where = "importance" if alone[0] in importance.units else "model"
        raise IsolateError(
            f"{alone[0]!r} is only in the {where}: the importance was measured on another model; measure it here"
        )
