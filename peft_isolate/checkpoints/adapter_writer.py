"""Writing an adapter that was computed, not trained: a delta at a time, without a model in memory."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn

from ..deltas.config import DeltaConfig
from ..deltas.delta import TRAINED, all_finite
from ..deltas.support import Support, delta_shape, read, without_holes
from ..errors import IsolateError, RegionError
from ..regions.selection import Selection
from ..regions.stored import Place, StoredSelection, storable
from .adapter import PREFIX, WEIGHTS
from .shards import Spool


class AdapterWriter:
    """The file of an adapter's tensors, which are not kept once they are added.

    Args:
        folder: Where it is to be.
        config: The adapter's: its method names the tensors, and the numbers are in its `save_dtype`.

    Attributes:
        rounded_by: What `save_dtype` took from a number, or gave to it, at most.
    """

    def __init__(self, folder: Path, config: DeltaConfig) -> None:
        self.folder, self.config = folder, config
        self.rounded_by = 0.0
        self._prefix = f"{config.peft_type.value.lower()}_"  # type: ignore[union-attr]
        self._spool = Spool(folder / WEIGHTS)

    def add(
        self, name: str, selection: Selection, delta: torch.Tensor, part: str = TRAINED
    ) -> tuple[Place, torch.Tensor]:
        """Put the numbers of a delta, and which they are, into the file.

        Args:
            name: The parameter.
            selection: Which of its scalars.
            delta: A tensor of the parameter's shape.
            part: "delta", or "held".

        Returns:
            (the selection as the config describes it, the numbers before `save_dtype`).

        Raises:
            IsolateError: They are NaN or infinite, in `save_dtype` at least.
        """
        support, index = Support.of(selection)
        shape = delta_shape(selection.kind, selection.shape, selection.indices.numel())
        numbers = without_holes(read(delta, support, index, shape), support, index)
        module, _, parameter = name.rpartition(".")
        stem = f"{PREFIX}{module}.{self._prefix}{parameter}.{part}"
        self._spool.add(stem, self._rounded(name, numbers))
        place = storable(selection)
        if isinstance(place, StoredSelection):
            assert place.data is not None
            self._spool.add(f"{stem}_codes", place.data)
        return place, numbers

    def _rounded(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        dtype = self.config.saved_torch_dtype
        rounded = numbers if dtype is None else numbers.to(dtype)
        if not all_finite(rounded):
            remedy = "use 'bfloat16' or None" if all_finite(numbers) else "they are none before, too"
            raise IsolateError(
                f"the numbers of {name!r} are NaN or infinite in save_dtype={self.config.save_dtype!r}: {remedy}"
            )
        if rounded is not numbers and numbers.numel():
            self.rounded_by = max(self.rounded_by, float((rounded - numbers).abs().max()))
        return rounded

    def close(self) -> int:
        """Write the file and the config beside it. Returns the bytes of the file."""
        self._spool.close({"format": "pt"})
        self.config.save_pretrained(str(self.folder))
        return (self.folder / WEIGHTS).stat().st_size


def address(config: DeltaConfig, model: nn.Module, name: str | None, revision: str | None = None) -> None:
    """Say in a config which base its adapter is for, as PEFT does of a model that it wrapped.

    Args:
        config: Is changed.
        model: The base, which may be on the meta device.
        name: Its folder or Hub id.
        revision: Of the Hub.
    """
    config.base_model_name_or_path, config.revision = name, revision
    config.auto_mapping = {
        "base_model_class": type(model).__name__,
        "parent_library": type(model).__module__,
    }
    if type(model).__name__.endswith("ForCausalLM"):
        config.task_type = "CAUSAL_LM"


def check_wrappable(names: Iterable[str], remedy: str) -> None:
    """Refuse parameters that no adapter which PEFT can load has together.

    Args:
        names: What is to have a delta.
        remedy: What to do about it.

    Raises:
        RegionError: A module with one of them lies inside another with one.
    """
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    for module in modules:
        for outer in accumulate(module.split(".")[:-1], "{}.{}".format):
            if outer in modules:
                raise RegionError(
                    f"{outer!r} and {module!r} lie inside one another, and parameters of both changed: PEFT cannot "
                    f"wrap a module inside a wrapped one; {remedy}"
                )
