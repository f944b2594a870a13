"""Pruning: of an adapter's delta the largest numbers stay, the others go back to the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..errors import IsolateError, RegionError
from ..regions.region import Region, base_parameters
from ..regions.selection import Selection
from ..regions.top import share_of, top
from .adapters import config_of, layers_of, parameter_deltas, regions_of, tuner_of
from .delta import Delta, all_finite
from .packed import inference_only


def prune(model: nn.Module, percent: float, adapter_name: str = "default") -> Region:
    """Keep the top `percent` % of |Δ|, over all of an adapter's tensors together, and put the rest back to the base.

    |Δ| is what the adapter adds to the weight at α = 1, in fp32: trained and held numbers, damped by the soft mask
    where there is one. The cut is exact: of the adapter's N scalars floor(percent · N / 100) stay; among equal |Δ| at
    the cut the tensor goes first that is earlier among the base model's `named_parameters()`, so that an adapter is
    pruned alike before it was saved and after it was loaded; in it the lower flat position. The others become exactly
    zero, in place.

    As after `half_reset`, an optimizer that was made before still has its momentum: prune between two trainers.
    Modules and tokens that the adapter carries whole stay as they are.

    Args:
        model: A PeftModel with an adapter of this library, not merged. Changed in place.
        percent: Of the scalars that the adapter may change, those still zero included; above 0, at most 100.
        adapter_name: The adapter.

    Returns:
        What was put back to zero.

    Raises:
        IsolateError: The model is no PeftModel of this library, or the adapter is merged, packed or sharded.
        RegionError: `percent` is out of range or not one scalar, or a number is NaN or infinite. Nothing was changed.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_isolate import HalfFTConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), HalfFTConfig(target_modules=["0"]))
        >>> prune(model, percent=10)
        Region(2 tensors, 18 scalars: 1 whole, 1 all_but)
    """
    share = share_of(percent)
    tuner = tuner_of(model)
    config = config_of(tuner, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers_of(tuner.model).values()):
        raise IsolateError(f"the adapter {adapter_name!r} is merged: unmerge_adapter() first")
    if config.packed is not None:
        raise inference_only(f"the adapter {adapter_name!r}")
    deltas = parameter_deltas(tuner.model, adapter_name)
    with torch.inference_mode(False):  # the region may be trained on later
        trained, held = regions_of(model, adapter_name)
        support = _in_order(trained | held, tuner.model)
        if share * support.count < 1:
            raise RegionError(f"{percent} % of {support.count:,} scalars is not one: take a larger percent")
        # Reads every tensor before one is written to: what is sharded, offloaded or no number is refused here.
        try:
            kept = top(lambda: _numbers(deltas, support), percent).region
        except RegionError as error:
            if broken := next((name for name in support if not all_finite(deltas[name].dense())), None):
                raise RegionError(
                    f"the adapter {adapter_name!r} has NaN or infinity for {broken!r}, so it has no largest |Δ|: the "
                    "training diverged, or its file was damaged; load a sound adapter"
                ) from error
            raise
        pruned = Region({name: _without(support[name], kept.get(name)) for name in support})
        for name in pruned:
            deltas[name].reset(pruned[name])
    return pruned


def _in_order(region: Region, model: nn.Module) -> Region:
    """The same, with its tensors in the order that they have in the base: layers keep the one they were wrapped in."""
    at = {name: i for i, name in enumerate(base_parameters(model))}
    places = region.places
    return Region({name: places[name] for name in sorted(places, key=lambda name: (at.get(name, len(at)), name))})


def _numbers(deltas: Mapping[str, Delta], support: Region) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(parameter, zeros, Δ) of what an adapter has numbers for, each (n,), in the order of their positions."""
    for name in support:
        numbers = deltas[name].dense().view(-1)
        if support[name].kind != "whole":
            numbers = numbers[support[name].positions().to(numbers.device)]
        yield name, numbers.new_zeros(()).expand(numbers.shape), numbers


def _without(selection: Selection, kept: Selection | None) -> Selection:
    """A selection less those of its scalars that are kept: `kept` counts them in the order of their positions."""
    if kept is None:
        return selection
    return selection - Selection.elements(selection.shape, selection.positions()[kept.positions()])
