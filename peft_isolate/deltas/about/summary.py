"""What an adapter is and how far it moved the model: by layer and role, in scalars, bytes and magnitudes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from ... import _version
from ...regions.plots import magnitude_text, plot_magnitudes, sorted_roles
from ...regions.selection import KINDS
from .text import size_text, table_lines

Key = tuple[int | None, str]


@dataclass(frozen=True)
class Row:
    """One role in one layer.

    Attributes:
        layer: From 0; None outside the layers.
        role: See `Role`; where the model was not at hand, what the module is called.
        kinds: Of the selections there; none where nothing is selected.
        parameters: Of which something is selected.
        scalars: That the model has there; None where it was not at hand.
        trained: Scalars that learned in the last round.
        held: Scalars that earlier rounds left.
        rms: Root mean square of the effective delta (a soft mask's factor is in it) over trained and held scalars.
        largest: Its largest magnitude.
    """

    layer: int | None
    role: str
    kinds: tuple[str, ...]
    parameters: int
    scalars: int | None
    trained: int
    held: int
    rms: float
    largest: float


@dataclass(frozen=True)
class Summary:
    """What an adapter is: `print(summary)`.

    Attributes:
        method: Its PEFT type, such as "HALFFT".
        title: Of the method, as its paper calls it.
        paper: Address of that; "" where there is none.
        fields: The config's fields that are the method's own, and those of `DeltaConfig` that were set.
        base: Name of the base model, a folder or a Hub id.
        revision: Of the base on the Hub.
        base_class: The base's class, where it is one of transformers'.
        task: PEFT's task type; None for none.
        fingerprint: Whether the adapter carries one of its base.
        rows: A row a layer and role, those of which nothing is selected included; in the order of layers.
        total: Scalars of the base; None where the model was not at hand.
        base_bytes: Of the base in its own dtypes; likewise.
        n_bytes: Of the deltas' tensors, positions and masks among them.
        dtype: Of the saved numbers, "float32" for example.
        packed: What they are packed as by `compress`; None for plain tensors.
        masked: Parameters whose delta a soft mask damps, or its gradient.
        beside: Modules that are saved whole beside the deltas, and embeddings with trained rows.
        peft_version: Of the PEFT that the config was made with.
        version: Of this library, which made the summary.
        remarks: What else there is to know of this summary.
    """

    method: str
    title: str
    paper: str
    fields: dict[str, Any]
    base: str | None
    revision: str | None
    base_class: str | None
    task: str | None
    fingerprint: bool
    rows: tuple[Row, ...]
    total: int | None
    base_bytes: int | None
    n_bytes: int
    dtype: str
    packed: str | None
    masked: int
    beside: tuple[str, ...]
    peft_version: str | None
    version: str = _version.__version__
    remarks: tuple[str, ...] = ()

    @property
    def trained(self) -> int:
        """Scalars that learned in the last round."""
        return sum(row.trained for row in self.rows)

    @property
    def held(self) -> int:
        """Scalars that earlier rounds left."""
        return sum(row.held for row in self.rows)

    @property
    def share(self) -> float | None:
        """Share of the base's scalars that the adapter may change."""
        return (self.trained + self.held) / self.total if self.total else None

    @property
    def rms(self) -> float:
        """Root mean square of the effective delta."""
        return _root_mean_square(self.rows)

    @property
    def largest(self) -> float:
        """Its largest magnitude."""
        return _largest(self.rows)

    def by_role(self) -> dict[str, Row]:
        """{role: all of its layers, and what stands outside them, in one row}."""
        found = {}
        for role in sorted_roles({(row.layer, row.role): 0 for row in self.rows}):
            rows = [row for row in self.rows if row.role == role]
            found[role] = Row(
                layer=None,
                role=role,
                kinds=sorted_kinds(kind for row in rows for kind in row.kinds),
                parameters=sum(row.parameters for row in rows),
                scalars=None if self.total is None else sum(row.scalars or 0 for row in rows),
                trained=sum(row.trained for row in rows),
                held=sum(row.held for row in rows),
                rms=_root_mean_square(rows),
                largest=_largest(rows),
            )
        return found

    def magnitudes(self) -> dict[Key, float]:
        """{(layer, role): root mean square}; 0 where nothing is selected."""
        return {(row.layer, row.role): row.rms for row in self.rows}

    def plot(self, path: str | os.PathLike[str], title: str = "Root mean square of Δ") -> None:
        """Draw how far the region moved, layers × roles, into an image file (needs the extra `plots`)."""
        plot_magnitudes(self.magnitudes(), path, title)

    def as_plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["rows"] = [vars(row) | {"kinds": list(row.kinds)} for row in self.rows]
        totals = {name: getattr(self, name) for name in ("trained", "held", "share", "rms", "largest")}
        return plain | {name: list(plain[name]) for name in ("beside", "remarks")} | totals

    def __str__(self) -> str:
        header = ("role", "layer", "selection", "parameters", "trained", "held", "share", "rms Δ", "largest |Δ|")
        selected = [row for row in self.rows if row.trained + row.held]
        lines = table_lines(
            header,
            [
                (
                    row.role, "-" if row.layer is None else str(row.layer), ", ".join(row.kinds),
                    f"{row.parameters:,}", f"{row.trained:,}", f"{row.held:,}", share_text(row),
                    magnitude_text(row.rms), magnitude_text(row.largest),
                )
                for row in selected
            ],
        )  # fmt: skip
        of = "" if self.total is None else f" of {self.total:,} scalars, {self.share:.2%}"
        lines += [
            f"method    {self.method}" + "".join(f", {name}={value!r}" for name, value in self.fields.items()),
            f"adapter   {self.trained:,} trained, {self.held:,} held{of}; rms {magnitude_text(self.rms)}, largest "
            f"{magnitude_text(self.largest)}",
            f"bytes     {size_text(self.n_bytes)}, {self.stored_as}"
            + ("" if self.base_bytes is None else f"; the base is {size_text(self.base_bytes)}"),
            f"base      {self.base or 'unknown'}" + (f", revision {self.revision}" if self.revision else "")
            + (", with a fingerprint" if self.fingerprint else ", without a fingerprint"),
            f"made      with PEFT {self.peft_version or 'unknown'}",
        ]  # fmt: skip
        if self.masked:
            lines.append(f"masked    {self.masked} parameters are damped by a soft mask")
        if self.beside:
            lines.append(f"beside    {', '.join(self.beside)}: saved by PEFT, outside the region and its promises")
        return "\n".join([*lines, *(f"and       {remark}" for remark in self.remarks)])

    @property
    def stored_as(self) -> str:
        """How the numbers lie in the file."""
        return self.dtype if self.packed is None else f"packed as {self.packed}"


def share_text(row: Row) -> str:
    """Which share of a row's scalars the adapter may change."""
    return f"{(row.trained + row.held) / row.scalars:.0%}" if row.scalars else "-"


def _root_mean_square(rows: Iterable[Row]) -> float:
    counts = [(row.trained + row.held, row.rms) for row in rows]
    total = sum(count for count, _ in counts)
    return math.sqrt(sum(count * rms * rms for count, rms in counts) / total) if total else 0.0


def _largest(rows: Iterable[Row]) -> float:
    found = [row.largest for row in rows]
    return math.nan if any(math.isnan(value) for value in found) else max(found, default=0.0)


def sorted_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """Each once, in their own order."""
    return tuple(sorted(set(kinds), key=KINDS.index))
