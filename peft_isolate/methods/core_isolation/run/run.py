"""`IsolationRun`: the whole of CPI-FT or DPI, from a base and a data set per task to one adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from peft import PeftConfig

from ..fusion import Elsewhere, SlerpOn
from ..slerp import EPSILON
from .examine import examine
from .processes import main_does
from .result import IsolationResult
from .steps import Steps


@dataclass
class IsolationRun:
    """CPI-FT (arXiv 2508.21741), or DPI (arXiv 2601.17777) with `fuse=False`: one model that keeps every task.

    Everything on the way is kept in `output_dir`. A run that was stopped or killed goes on from its last finished step
    when it is started again with the same settings, and ends with the same numbers, bit for bit, where the device
    computes the same twice (`full_determinism` of TRL's arguments helps a GPU). `seed` draws what is held out, the
    samples and the order of the groups; trainings are seeded by TRL's own `seed`.

    Args:
        base: Folder or Hub id. Every training starts from it; it is never changed.
        tasks: {name: rows}, two or more. Rows are a JSONL file, a `datasets.Dataset` or a list of mappings with
            "prompt" and "completion", "text", or "messages"; or {"train": rows, "test": rows}. Without a test part 5 %
            of the rows are held out, at least one and at most 500.
        output_dir: A folder of this run's own.
        sft: How stages are trained: an `SFTConfig`, or a mapping of its arguments.
        probe_sft: Arguments that are others for the probes.
        percent, scope, score, include_embeddings: Of the core regions, see `core_region`. With score="gradient" no
            probe is trained: `fuse=False`, or pass `probes`.
        threshold, order, seed: Of the groups, see `group_tasks`.
        fuse: Whether the probes are fused, and the groups trained again on a sample (CPI-FT), or not (DPI).
        elsewhere, slerp_on, omega, epsilon: See `fuse`; several ω are in the order of the groups' tasks.
        stage_data: What the first pass over the groups trains on: "full", all rows, or "sample".
        sample: Rows of each task in the balanced sample. None: a tenth of the smallest task or 1,000, the smaller.
        probe_rows: Rows of a probe. None: a tenth of its task or 1,000, the larger, at most all.
        freeze_all_cores: After fusion, freeze the cores of all tasks in each stage, not only of earlier groups.
        probes: {task: folder} of adapters or checkpoints that were tuned elsewhere from the same base.
        probe_config: How the other probes are trained: any config of PEFT, such as `LoraConfig`. None: everything in
            scope.
        save_dtype: Of the final adapter; see `DeltaConfig`. On the way all is kept in fp32.
        exact_match: Score, beside the loss, how many prompts are answered exactly, by greedy generation, where rows
            have "prompt" and "completion" as text.
        merge: Write the merged model, too.
        progress: Show what is done, and Trainer's bars.

    Example:
        >>> run = IsolationRun("Qwen/Qwen3-0.6B", {"math": "math.jsonl", "code": "code.jsonl"}, "run", percent=1.0)
        >>> run.threshold
        0.1
    """

    base: str | os.PathLike[str]
    tasks: Mapping[str, Any] | Sequence[tuple[str, Any]]
    output_dir: str | os.PathLike[str]
    _: KW_ONLY
    sft: Any = None
    probe_sft: Any = None
    percent: float = 1.0
    scope: Literal["global", "tensor"] = "global"
    score: Literal["update", "gradient"] = "update"
    include_embeddings: bool = False
    threshold: float | None = 0.1
    order: Sequence[str] | None = None
    seed: int = 0
    fuse: bool = True
    elsewhere: Elsewhere = "slerp"
    slerp_on: SlerpOn = "weights"
    omega: float | Sequence[float] | None = None
    epsilon: float = EPSILON
    stage_data: Literal["full", "sample"] = "full"
    sample: int | None = None
    probe_rows: int | None = None
    freeze_all_cores: bool = False
    probes: Mapping[str, str | os.PathLike[str]] | None = None
    probe_config: PeftConfig | None = None
    save_dtype: str | None = None
    exact_match: bool = True
    merge: bool = False
    progress: bool = True

    def check(self) -> tuple[str, ...]:
        """Find every mistake that can be found before a training. Nothing is written.

        Returns:
            What else there is to know before it starts, such as how large the adapter will be.

        Raises:
            IsolateError: Of any of them; see the message.
            ImportError: TRL is not installed.
        """
        return examine(self).notes

    def run(self) -> IsolationResult:
        """Run it, or go on with it. Under accelerate every process calls this, and gets the same result.

        Returns:
            Where everything is, and how well every task is done after every step.

        Raises:
            IsolateError: See `check`; a probe that changed nothing; a training that diverged. What was finished stays.
            FormatError: A file of the folder is damaged.
        """
        work = examine(self)
        with ExitStack() as claims:
            main_does(lambda: claims.enter_context(work.layout.claimed()))
            return _cpi_ft(Steps(work))


def _cpi_ft(steps: Steps) -> IsolationResult:
    """The method (arXiv 2508.21741, section 3). What is there already is not done again."""
    run = steps.run
    steps.begin()
    steps.score_base()
    for task in steps.tasks:
        steps.probe(task)  # θ_i
        steps.core(task)  # C_i
    groups = steps.group()  # G_1 … G_K
    model = steps.train_groups(groups, after=None, sampled=run.stage_data == "sample")  # θ_base
    if run.fuse:
        fused = steps.fuse(groups, onto=model)
        model = steps.train_groups(groups, after=fused, sampled=True, freeze_all=run.freeze_all_cores)
    steps.finish(model)
    return steps.report()
