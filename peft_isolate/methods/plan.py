"""What a config would train, before anything is trained."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..deltas import DeltaConfig
from ..deltas.about.text import size_text, table_lines
from ..deltas.about.totals import Totals
from ..deltas.adapters import resolved_regions
from ..deltas.targets import saved_modules, token_modules
from ..errors import IsolateError
from ..regions.plots import plot_trained_share
from ..regions.region import Region, base_bytes, logical_shape, n_bytes, walk_parameters
from ..regions.roles import RoleName, roles
from ..regions.selection import Selection


@dataclass(frozen=True)
class PlanRow:
    """One parameter, or one block of a fused one, and what is trained of it.

    Attributes:
        parameter: Its name in the base model.
        role: What it is, see `Role`.
        layer: Its layer, from 0; None outside the layers.
        expert: Its expert, from 0; None outside the experts.
        selection: The trained part; None where it stays frozen.
        scalars: Scalars it has.
        trained: Scalars that learn.
    """

    parameter: str
    role: RoleName
    layer: int | None
    expert: int | None
    selection: Selection | None
    scalars: int
    trained: int


@dataclass(frozen=True)
class Plan:
    """What a config trains on a model: `print(plan(model, config))`.

    Attributes:
        region: The region that learns.
        held: What earlier rounds left on the rest, and stays.
        rows: A row a parameter, or a block of a fused one, frozen ones included, in the model's order.
        total: Scalars of the base model, tied tensors once.
        base_bytes: Bytes of the base model in its own dtypes.
        outside_bytes: Bytes of what `modules_to_save` and `trainable_token_indices` train beside the region, in the
            base's dtypes; the promises of this library do not cover it.
        remarks: What else there is to know of the config, such as whether a soft mask damps what learns.
    """

    region: Region
    held: Region
    rows: tuple[PlanRow, ...]
    total: int
    base_bytes: int
    outside_bytes: int
    remarks: tuple[str, ...] = ()

    @property
    def totals(self) -> Totals:
        """The counts of it all."""
        return Totals(self.region.count, self.held.count, self.total, self.base_bytes)

    @property
    def trained(self) -> int:
        """Scalars that learn."""
        return self.totals.trained

    @property
    def share(self) -> float:
        """Share of the base model's scalars that learns."""
        return self.totals.share

    @property
    def untouched(self) -> float:
        """Share of the base model's scalars that neither this round nor an earlier one touches."""
        return self.totals.untouched

    @property
    def adapter_bytes(self) -> dict[str, int]:
        """Bytes of the saved numbers: {"fp32": …, "bf16": …, "int8": …}, without positions and file headers."""
        return self.totals.adapter_bytes

    @property
    def training_bytes(self) -> dict[str, int]:
        """Bytes that training holds beside the activations: weights, and fp32 deltas, gradients and Adam's moments."""
        return self.totals.training_bytes

    def __str__(self) -> str:
        header = ("parameter", "role", "layer", "selection", "trained", "share")
        # The experts of one tensor share a line.
        lines_of: dict[tuple[str, str], list[PlanRow]] = defaultdict(list)
        for row in self.rows:
            lines_of[row.parameter, row.role].append(row)
        table = [
            (
                parameter,
                role,
                "-" if rows[0].layer is None else str(rows[0].layer),
                _describe(rows),
                f"{sum(row.trained for row in rows):,}",
                f"{sum(row.trained for row in rows) / sum(row.scalars for row in rows):.0%}",
            )
            for (parameter, role), rows in lines_of.items()
            if any(row.trained for row in rows)
        ]
        lines = table_lines(header, table)
        frozen = sum(row.selection is None for row in self.rows)
        unknown = sum(row.scalars for row in self.rows if row.selection is None and row.role == "unknown")
        lines += [
            f"({frozen} more stay frozen" + (f", {unknown:,} scalars of unknown role among them)" if unknown else ")"),
            *self.totals.lines(),
        ]
        lines += [f"and       {remark}" for remark in self.remarks]
        if self.outside_bytes:
            lines.append(
                f"beside    {size_text(self.outside_bytes)} by modules_to_save and trainable_token_indices: trained "
                "and saved by PEFT, outside the region and its promises"
            )
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str], title: str = "Trained share") -> None:
        """Draw what is trained, layers × roles, into an image file (needs the extra `plots`)."""
        scalars: dict[tuple[int | None, str], int] = defaultdict(int)
        trained: dict[tuple[int | None, str], int] = defaultdict(int)
        for row in self.rows:
            scalars[row.layer, row.role] += row.scalars
            trained[row.layer, row.role] += row.trained
        plot_trained_share({key: trained[key] / scalars[key] for key in scalars}, path, title=title)


def plan(model: nn.Module, config: DeltaConfig) -> Plan:
    """What `config` would train on `model`. Neither is changed; a model on the meta device will do.

    Args:
        model: The base model.
        config: A config of this library. One that has been used already tells what it trained.

    Returns:
        The table, its totals, and the region.

    Raises:
        IsolateError: Not a config of this library; or as `get_peft_model` would raise, see `DeltaConfig.resolve`.
    """
    if not isinstance(config, DeltaConfig):
        raise IsolateError(
            f"plan knows the configs of peft_isolate, not {type(config).__name__}: pass a HalfFTConfig, for example"
        )
    region, held, masks = resolved_regions(model, config)
    rows = []
    for role in roles(model):
        part = region[role.parameter] & role.selection if role.parameter in region else None
        if part is not None and not part.count:
            part = None
        trained = part.count if part else 0
        count = role.selection.count
        rows.append(PlanRow(role.parameter, role.name, role.layer, role.expert, part, count, trained))
    return Plan(
        region=region,
        held=held,
        rows=tuple(rows),
        total=sum(row.scalars for row in rows),
        base_bytes=base_bytes(model),
        outside_bytes=_outside_bytes(model, config),
        remarks=tuple(config.remarks(masks)),
    )


def _outside_bytes(model: nn.Module, config: DeltaConfig) -> int:
    tokens = token_modules(model, config)
    total = 0
    for parameter_name, module_name, module, parameter in walk_parameters(model):
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module_name) for name in saved_modules(config)):
            total += n_bytes(parameter)
        if module_name in tokens:
            width = logical_shape(module, parameter_name.rpartition(".")[2], parameter)[-1]
            total += tokens[module_name] * width * parameter.element_size()
    return total


def _describe(rows: Sequence[PlanRow]) -> str:
    """What is selected of a parameter, or of all its experts."""
    selections = [row.selection for row in rows if row.selection is not None]
    if rows[0].expert is not None:
        return f"{len(selections):,} of {len(rows):,} experts"
    kind = selections[0].kind
    return kind if kind == "whole" else f"{selections[0].indices.numel():,} {kind}"
