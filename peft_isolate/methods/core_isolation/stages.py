"""What CPI-FT does between two stages: hold what was learned, freeze other cores (arXiv 2508.21741, section 3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ...deltas.adapters import config_of, rearrange, regions_of, tuner_of
from ...errors import IsolateError
from ...regions.region import Region
from .config import CoreIsolationConfig


def next_stage(
    model: nn.Module, *, frozen: Any, train: str = "complement", core: Any = None, adapter_name: str = "default"
) -> Region:
    """Begin another stage: freeze these regions, and train the rest, or a core.

    The model computes the same numbers before and after, bit for bit, and its base stays W0: nothing is rounded into
    it. What learns from now on goes on where it was; the rest of what was learned is held. Call it between two
    trainers: the adapter has new parameters afterwards, which an optimizer made before does not know. Whatever stops
    it, the adapter is as it was; so old and new parameters are in memory together until it is done.

    Args:
        model: A PeftModel with an adapter of `CoreIsolationConfig`, not merged: one that was trained, or that `fuse`
            made.
        frozen: All that shall stay as it is: what was frozen before and is not named here learns again. `[]` freezes
            nothing.
        train, core: As in `CoreIsolationConfig`.
        adapter_name: The adapter.

    Returns:
        What learns from now on.

    Raises:
        IsolateError: The model is no PeftModel of this library, its adapter is another method's, or it is merged;
            nothing was changed.
        RegionError: A region is another model's, or leaves nothing to train; nothing was changed.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_isolate.regions import Selection
        >>> two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model = get_peft_model(two, CoreIsolationConfig(target_modules=["0", "1"]))
        >>> next_stage(model, frozen=Region({"0.weight": Selection.elements((2, 2), [3])})).count
        11
    """
    tuner = tuner_of(model)
    config = config_of(tuner, adapter_name)
    if not isinstance(config, CoreIsolationConfig):
        raise IsolateError(
            f"{adapter_name!r} is an adapter of {type(config).__name__}, which has no cores: next_stage is for "
            "CoreIsolationConfig"
        )
    fields = {"train": train, "core": core, "frozen": frozen, "inference_mode": False}
    with torch.inference_mode(False):  # what is made here shall be able to learn
        fresh = dataclasses.replace(config, **fields, resolved=None)
        trained = fresh.resolve(tuner.model).region
        learned, held = regions_of(model, adapter_name)
        # The regions in their normal form, and how large they were when they were read.
        fields |= {"frozen": fresh.frozen, "counts": fresh.counts}
        rearrange(tuner, adapter_name, trained, (learned | held) - trained, **fields)
    return trained
