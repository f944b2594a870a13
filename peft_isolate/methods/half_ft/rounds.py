"""What HFT does between two rounds: draw the next half, or put a half back (arXiv 2404.18466, sections 2 and 3)."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from ...deltas.adapters import config_of, parameter_deltas, rearrange, regions_of, tuner_of
from ...deltas.support import copy_selected
from ...errors import IsolateError
from ...regions.region import Region, check_shape, is_plain, shapes_of, walk_parameters
from ...regions.roles import Role, roles
from .config import HalfFTConfig
from .draw import category, draw, members


def next_round(model: nn.Module, adapter_name: str = "default", round_index: int | None = None) -> Region:
    """Begin another round: hold what was learned so far, draw the next half, and train that.

    The model computes the same numbers before and after, bit for bit, and its base stays W0: nothing is rounded into
    it. Where the halves overlap the same numbers go on learning; the rest of what was learned is held. Call it between
    two trainers: the adapter has new parameters afterwards, which an optimizer made before does not know. Whatever
    stops it, the adapter is as it was; so old and new parameters are in memory together until it is done.

    Args:
        model: A PeftModel with an HFT adapter, not merged.
        adapter_name: The adapter.
        round_index: Number of the new round; None for the one after the last.

    Returns:
        The half that learns from now on.

    Raises:
        IsolateError: The model is no PeftModel of this library, its adapter is not HFT's, or it is merged; nothing
            was changed.

    Example:
        >>> from peft import get_peft_model
        >>> two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model = get_peft_model(two, HalfFTConfig(target_modules=["0", "1"]))
        >>> next_round(model)
        Region(2 tensors, 6 scalars: 2 whole)
    """
    tuner = tuner_of(model)
    config = config_of(tuner, adapter_name)
    if not isinstance(config, HalfFTConfig):
        raise IsolateError(
            f"{adapter_name!r} is an adapter of {type(config).__name__}, which draws no halves: next_round is for "
            "HalfFTConfig; leave it out to train the same region further"
        )
    index = config.round_index + 1 if round_index is None else round_index
    fresh = copy.copy(config)
    fresh.round_index, fresh.resolved = index, None
    fresh.__post_init__()  # checks the number
    with torch.inference_mode(False):  # what is made here shall be able to learn
        trained = fresh.resolve(tuner.model).region
        learned, held = regions_of(model, adapter_name)
        rearrange(tuner, adapter_name, trained, (learned | held) - trained, round_index=index, inference_mode=False)
    return trained


def half_reset(
    model: nn.Module,
    fraction: float = 0.5,
    seed: int = 0,
    *,
    base: nn.Module | None = None,
    adapter_name: str = "default",
) -> Region:
    """Half-Reset: put a random part of what was tuned back to the base.

    The paper's pilot: knowledge comes back, ability drops slightly. Drawn as HFT draws, in every layer and category.

    Args:
        model: A PeftModel: then the part is drawn among what its adapter touches, and its deltas become zero there,
            held ones too. Or a fully tuned model, with its `base`: then the part is drawn among the matrices and norms
            of its layers. Changed in place.
        fraction: Share of the matrices, in (0, 1].
        seed: Of the draw.
        base: The model that `model` was tuned from; unchanged.
        adapter_name: The adapter, where there is one.

    Returns:
        What was put back.

    Raises:
        IsolateError: There is neither an adapter nor a base, or the adapter is merged; nothing was changed.
        RegionError: `base` is another model: a name or shape differs.
    """
    HalfFTConfig(fraction=fraction, seed=seed)  # checks the numbers
    with torch.inference_mode(False):  # what is put back, and where, goes on learning
        if base is None:
            return _reset_adapter(model, fraction, seed, adapter_name)
        return _reset_tuned(model, base, fraction, seed)


def _reset_tuned(model: nn.Module, base: nn.Module, fraction: float, seed: int) -> Region:
    if hasattr(model, "peft_config"):
        raise IsolateError(
            "half_reset got an adapter and a base: leave out base= to reset the adapter, or merge the adapter first"
        )
    inside = [role for role in roles(model) if role.layer is not None and not role.tower and category(role) != "other"]
    reset = _drawn(inside, fraction, seed)
    shapes = shapes_of(base)
    for name, selection in reset.items():
        check_shape(name, selection.shape, shapes)
    mine, theirs = ({name: (module, p) for name, _, module, p in walk_parameters(m)} for m in (model, base))
    for name in reset:
        for module, parameter in (mine[name], theirs[name]):
            if not is_plain(parameter, module) or parameter.is_meta:
                raise IsolateError(
                    f"{name!r} is quantised, sharded or offloaded in one of the two models, and can be neither read "
                    "nor written: load both in their own dtype on one device; nothing was changed"
                )
    with torch.no_grad():
        for name, selection in reset.items():
            (_, parameter), (_, source) = mine[name], theirs[name]
            reset_to = parameter.detach().contiguous()
            copy_selected(reset_to, source.detach(), selection)
            parameter.copy_(reset_to)
    return reset


def _reset_adapter(model: nn.Module, fraction: float, seed: int, adapter_name: str) -> Region:
    tuner = tuner_of(model)
    trained, held = regions_of(model, adapter_name)
    support = trained | held
    if any(adapter_name in getattr(module, "merged_adapters", ()) for module in model.modules()):
        raise IsolateError(f"the adapter {adapter_name!r} is merged: unmerge_adapter() first")
    reset = _drawn([role for role in roles(tuner.model) if role.parameter in support], fraction, seed) & support
    for name, delta in parameter_deltas(tuner.model, adapter_name).items():
        if name in reset:
            delta.reset(reset[name])
    return reset


def _drawn(pool: Iterable[Role], fraction: float, seed: int) -> Region:
    return draw(members(pool), fraction=fraction, seed=seed)
