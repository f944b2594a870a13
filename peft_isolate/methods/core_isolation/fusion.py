"""`fuse`: each task's core from its own model, everything else in between (CPI-FT, arXiv 2508.21741, section 3)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from ...checkpoints.adapter_writer import AdapterWriter, address, check_wrappable
from ...checkpoints.difference import Difference, base_weights, difference_of
from ...checkpoints.extract import tightest
from ...checkpoints.inspect import add_card
from ...checkpoints.progress import progress
from ...checkpoints.weights import Source, Weights
from ...deltas.about.text import size_text
from ...deltas.delta import HELD
from ...deltas.targets import tied_names
from ...errors import IsolateError, RegionError
from ...regions.files import check_free, write_folder
from ...regions.fingerprint import fingerprint
from ...regions.region import Region
from ...regions.stored import Place, StoredSelection
from .config import AnyRegion, CoreIsolationConfig, loaded
from .grouping import check_tasks
from .mixing import Mixer, Task
from .scope import scope
from .slerp import EPSILON

Elsewhere = Literal["slerp", "linear", "keep"]
SlerpOn = Literal["weights", "delta"]


@dataclass(frozen=True)
class Fused:
    """What `fuse` made.

    Attributes:
        folder: Where the adapter is.
        tasks: In the order in which they were fused.
        omegas: ω of each.
        transplanted: {task: scalars that have its number}.
        conflicts: Scalars that the cores of several tasks have.
        won: {task: how many of those have its number}.
        slerped, linear, kept: Tensors that were interpolated outside the cores along the arc, linearly, and not at
            all; a tensor counts once for each task.
        tensors: Parameters that differ from the base's.
        scalars: Scalars that the adapter has a number for.
        n_bytes: Of the adapter's file.
        rounded_by: What `save_dtype` changed a number by, at most.
    """

    folder: Path
    tasks: tuple[str, ...]
    omegas: tuple[float, ...]
    transplanted: dict[str, int]
    conflicts: int
    won: dict[str, int]
    slerped: int
    linear: int
    kept: int
    tensors: int
    scalars: int
    n_bytes: int
    rounded_by: float = 0.0

    def __str__(self) -> str:
        return "\n".join([f"{self.folder}:", *self.lines()])

    def lines(self) -> list[str]:
        """What was done, in words and counts."""
        of_task = [
            f"{task} {self.transplanted[task]:,} scalars (ω = {omega:.3g})"
            for task, omega in zip(self.tasks, self.omegas, strict=True)
        ]
        lines = [
            f"{self.scalars:,} scalars in {self.tensors} tensors are held, {size_text(self.n_bytes)}",
            f"transplanted: {', '.join(of_task)}",
            f"elsewhere each task was folded into each tensor: {self.slerped} times along the arc, {self.linear} "
            f"linearly, {self.kept} not at all",
        ]
        if self.conflicts:
            wins = ", ".join(f"{task} {count:,}" for task, count in self.won.items())
            lines.append(f"{self.conflicts:,} scalars are in several cores; of these have: {wins}")
        if self.rounded_by:
            lines.append(f"save_dtype rounded the numbers by at most {self.rounded_by:.3g}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self) | {
            "folder": os.fspath(self.folder), "tasks": list(self.tasks), "omegas": list(self.omegas),
        }  # fmt: skip


def fuse(
    base: Source | Weights,
    tuned: Mapping[str, Any],
    regions: Mapping[str, AnyRegion],
    out: str | os.PathLike[str],
    *,
    onto: Any = None,
    elsewhere: Elsewhere = "slerp",
    slerp_on: SlerpOn = "weights",
    omega: float | Sequence[float] | None = None,
    epsilon: float = EPSILON,
    include_embeddings: bool = False,
    save_dtype: str | None = None,
    revision: str | None = None,
) -> Fused:
    """Fuse the models of several tasks into one adapter over their base, a tensor in memory at a time.

    On a task's core region the result has that task's numbers, T, carried as `T − W0`: merged, they are T bit for bit
    where T and W0 are within a factor of two of one another, as nearly all are after a short training, and elsewhere T
    to 1.5 units in the last place of the larger of |T| and |W0|. Where the cores of two tasks have a scalar, the task
    whose |Δ| is the larger share of its mean |Δ| over its whole core has it; of equal ones the earlier task. Outside
    of all cores, tensor by tensor over the scalars that are in none, θ ← SLERP(θ, θ_i, ω_i) for one task after
    another, beginning with θ = `onto`; linearly where |cos| > 1 − ε.

    The paper leaves open, and our choices are: one angle per tensor, over its scalars outside of the cores; the fold
    and its ω; ε; `slerp_on`; who wins a scalar of two cores.

    Args:
        base: W0, which all others were tuned from: a model, a state dict, a folder or Hub id.
        tuned: {task: its tuned model}, anything that `difference_of` takes: models, state dicts, checkpoints,
            adapters. In the order in which they are fused: that of the groups. Of what lies out of scope nothing is
            taken.
        regions: {task: its core region, or a file of it}.
        out: A new folder.
        onto: θ_base: the model after the last stage of fine-tuning, likewise. What it has out of scope is kept. None:
            the base itself.
        elsewhere: Outside of the cores: "slerp", "linear", or "keep" for `onto` as it is.
        slerp_on: "weights" measures the angle between W0 + Δ, as printed; between short probes it is so small that
            this is the same as linear. "delta" measures it between the Δ.
        omega: ω_i, from 0 (`onto`) to 1 (that task): one for every task, or one for each. None: 0 for one task, which
            is to be fused with nothing; 0.5 for two; for more 1/(i + 1) for the i-th, which weighs all models alike.
        epsilon: ε, from 0 to 1.
        include_embeddings: Whether embeddings, head and tied parameters are in scope: as for the core regions.
        save_dtype: As in `DeltaConfig`. None: fp32, or float64 over a float64 base.
        revision: Of the base on the Hub.

    Returns:
        What was done. The folder holds an adapter of `CoreIsolationConfig` that learns nothing and *holds* what was
        fused: it loads, merges, and `next_stage` trains on.

    Raises:
        RegionError: A core region is empty, out of scope or of another model; nothing of it moved; a number is NaN or
            infinite; nothing differs from the base. Nothing was written.
        IsolateError: See the message. Nothing was written.
        FormatError: A file is damaged. Nothing was written.
    """
    check_free(out)
    check_options(tuned, regions, elsewhere, slerp_on, epsilon)
    omegas = omegas_of(omega, len(tuned), elsewhere)
    config = CoreIsolationConfig(include_embeddings=include_embeddings, save_dtype=save_dtype, inference_mode=True)
    weights = base_weights(base, next(iter(tuned.values())), revision)
    names = [name for name in scope(weights.model, include_embeddings) if name in weights]
    cores = {task: _core(task, regions[task], weights, names) for task in tuned}
    tasks = [
        Task(task, _difference(weights, model, f"tuned[{task!r}]"), cores[task], share)
        for (task, model), share in zip(tuned.items(), omegas, strict=True)
    ]
    start = None if onto is None else _difference(weights, onto, "onto")
    for task in tasks:
        task.measure()
    mixer = Mixer(
        weights, start, tasks, linear=elsewhere == "linear", on_weights=slerp_on == "weights", epsilon=epsilon
    )
    with write_folder(out) as folder:
        writer = _Writer(weights, mixer, set(names), AdapterWriter(folder, config))
        for name in progress(list(weights), "fuse"):
            writer.write(name)
        fused = writer.close(Path(out))
        add_card(folder, weights.folder, fused.lines())
    return fused


class _Writer:
    """Puts what is fused into an adapter. Of one tensor nothing is held at the next."""

    def __init__(self, weights: Weights, mixer: Mixer, scope: set[str], file: AdapterWriter) -> None:
        self.weights, self.mixer, self.scope, self.file = weights, mixer, scope, file
        self.tied = tied_names(weights.model, weights)
        self.places: dict[str, Place] = {}

    def write(self, name: str) -> None:
        """One parameter, in scope or not."""
        delta = self.mixer.fused(name) if name in self.scope else self.mixer.carried(name)
        if delta is None or not bool((changed := delta != 0).any()):
            return
        if name in self.tied:
            raise RegionError(
                f"{name!r} differs from the base's and is tied to {self.tied[name]}, where a delta would be missed: "
                "fuse onto a model that left it as it was, and without include_embeddings"
            )
        place, _ = self.file.add(name, tightest(changed), delta, HELD)
        # The file has the codes.
        self.places[name] = dataclasses.replace(place, data=None) if isinstance(place, StoredSelection) else place

    def close(self, out: Path) -> Fused:
        """Write the config."""
        if not self.places:
            raise RegionError(
                "what was fused does not differ from the base: there is nothing to save; fuse other models, or onto "
                "another one"
            )
        check_wrappable(self.places, "fuse onto a model in which one of the two is as in the base")
        weights, mixer, config, held = self.weights, self.mixer, self.file.config, Region(self.places)
        config.record(Region(), weights.model, fingerprint(weights.items()), held=held)
        named = weights.name if weights.folder is not None else getattr(weights.model, "name_or_path", None)
        address(config, weights.model, named or None, weights.revision)
        config.resolve(weights.model)  # what could not be loaded is refused now
        names = tuple(task.name for task in mixer.tasks)
        return Fused(
            folder=out, tasks=names, omegas=tuple(task.omega for task in mixer.tasks),
            transplanted=dict(zip(names, mixer.transplanted.tolist(), strict=True)), conflicts=mixer.conflicts,
            won=dict(zip(names, mixer.won.tolist(), strict=True)), slerped=mixer.steps["slerp"],
            linear=mixer.steps["linear"], kept=mixer.steps["keep"], tensors=len(held), scalars=held.count,
            n_bytes=self.file.close(), rounded_by=self.file.rounded_by,
        )  # fmt: skip


def check_options(
    tuned: Mapping[str, Any], regions: Mapping[str, Any], elsewhere: str, slerp_on: str, epsilon: float
) -> None:
    for name, given in (("tuned", tuned), ("regions", regions)):
        if not isinstance(given, Mapping):
            raise IsolateError(f"{name} is a {type(given).__name__}: pass a mapping, one entry for each task")
    if not tuned:
        raise IsolateError("there is nothing to fuse: pass one tuned model or several, {task: model}")
    check_tasks(tuned)
    if different := sorted(tuned.keys() ^ regions.keys()):
        has, lacks = ("tuned", "regions") if different[0] in tuned else ("regions", "tuned")
        raise IsolateError(f"the task {different[0]!r} is in {has} and not in {lacks}: pass both for every task")
    for name, value, allowed in (
        ("elsewhere", elsewhere, get_args(Elsewhere)), ("slerp_on", slerp_on, get_args(SlerpOn)),
    ):  # fmt: skip
        if value not in allowed:
            raise IsolateError(f"{name}={value!r} is unknown: use one of {allowed}")
    if not _is_share(epsilon):
        raise IsolateError(f"epsilon={epsilon!r}: use a number from 0 to 1, like {EPSILON}")


def omegas_of(omega: Any, n: int, elsewhere: str) -> list[float]:
    """ω of each of `n` tasks."""
    if elsewhere == "keep":
        if omega is not None:
            raise IsolateError(f"omega={omega!r} has no effect with elsewhere='keep': leave one of the two out")
        return [0.0] * n
    if omega is None:
        return [0.0] if n == 1 else [0.5, 0.5] if n == 2 else [1.0 / (i + 1) for i in range(1, n + 1)]
    given = list(omega) if isinstance(omega, list | tuple) else [omega] * n
    if len(given) != n or not all(map(_is_share, given)):
        raise IsolateError(f"omega={omega!r}: use None, one number from 0 to 1, or one for each of {n} tasks")
    return [float(each) for each in given]


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def _core(task: str, given: Any, weights: Weights, names: list[str]) -> Region:
    """The core region of a task, which fits the base and lies in scope."""
    if not isinstance(given, Region | str | os.PathLike):
        raise IsolateError(
            f"regions[{task!r}] is a {type(given).__name__}: pass what core_region returned, or the file it was saved "
            "to"
        )
    with _named(f"the core region of {task!r}"):
        core = loaded(given, f"regions[{task!r}]", weights.shapes)
        if not core:
            raise RegionError("it is empty; find it anew with core_region, or leave the task out")
        inside = set(names)
        if outside := [name for name in core if name not in inside]:
            raise RegionError(
                f"it has scalars of {outside[0]!r}, which is not in scope: pass include_embeddings=True, or a core "
                "that was found without"
            )
    return core


def _difference(weights: Weights, model: Any, what: str) -> Difference:
    with _named(what):
        return difference_of(weights, model)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Say of an error what it is about."""
    try:
        yield
    except IsolateError as error:
        raise type(error)(f"{what}: {error}") from error
