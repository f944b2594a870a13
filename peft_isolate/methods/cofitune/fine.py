"""How far CoFiTune's region moves: importances of units as soft masks (arXiv 2404.10306, section 3.2)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from ...deltas.soft_mask import Axis, Damps, SoftMask, units_on
from ...errors import IsolateError
from ...regions.fused import by_columns, is_transposed, n_fused_experts
from ...regions.region import Region, walk_parameters
from ...regions.roles import Role, roles
from .importance import Importance
from .importance.sites import unit_shapes


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
    _check_units(every, importance, region, unit_shapes(model))
    modules = {name: module for name, _, module, _ in walk_parameters(model)}
    n_query_units: dict[str | None, int] = {}
    of_parameter: dict[str, torch.Tensor] = {}
    axes: dict[str, Axis] = {}
    free = []
    for role in sorted(every, key=lambda role: role.name != "q"):  # which tells how wide a head is
        key, module = Importance.key_of(role), modules[role.parameter]
        axis: Axis = "columns" if by_columns(module, role.selection.shape) else "rows"
        n_units = units_on(role.selection, axis)
        if role.name == "q":
            n_query_units.setdefault(key, n_units or 0)
        if role.parameter not in region:
            continue
        units = importance.units[key] if key in importance.units else torch.empty(0)
        if role.expert is not None:
            units = units[role.expert]
        if role.name in ("q", "k", "v"):
            units = _by_head(units, n_units or 0, n_query_units.get(key, 0))
        # The units of an expert that lies transposed beside others are neither rows nor columns of the whole tensor.
        across = n_fused_experts(module) and is_transposed(module)
        if across or n_units is None or units.numel() != n_units:
            free.append(role)
            continue
        rows, columns = role.selection.matrix_shape
        block = slice(None) if role.selection.kind == "whole" else role.selection.indices
        axes[role.parameter] = axis
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
    width = n_query_units // heads.numel() if heads.numel() else 0
    if not width or n_units % width or heads.numel() % (n_units // width or 1):
        return heads[:0]
    return heads.reshape(n_units // width, -1).amax(1).repeat_interleave(width)


def _check_units(
    every: list[Role], importance: Importance, region: Region, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Single modules of a layer may not have been measured (`measure_importance` has said so), whole layers are."""
    for key, units in importance.units.items():
        there = shapes.get(key, "not")
        if tuple(units.shape) != there:
            raise IsolateError(
                f"{key!r} is of shape {tuple(units.shape)} in the importance and {there} in this model: it was "
                "measured on another model; measure it on this one"
            )
    measured = {tuple(key.rsplit(".", 3)[:2]) for key in importance.units}
    for role in every:
        if role.parameter in region and (role.stack, str(role.layer)) not in measured:
            raise IsolateError(
                f"layer {role.layer} of {role.stack} is not in the importance: it was measured on another model; "
                "measure it on this one"
            )
