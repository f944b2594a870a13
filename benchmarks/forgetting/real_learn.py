"""One run of a model of one's own: it learns the new task in one way, and is asked everything on the way."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from arms import METHODS, Arm, Method
from datasets import Dataset
from learn import dialled, learnable, reset, taught
from measure import file_size
from outcomes import interpolated, place_of
from peft import get_peft_model
from real_data import Exam
from real_settings import Setting
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig

from peft_isolate import half_reset, next_round
from peft_isolate.errors import IsolateError
from peft_isolate.evaluation.rows import Batches

Point = dict[str, Any]
# Rows of the new task that importance is measured on.
MEASURED = 128


@dataclass(frozen=True)
class Run:
    """One arm with one learning rate and seed."""

    setting: Setting
    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """As it is printed."""
        return f"{self.arm}, rate {self.rate:g}, seed {self.seed}"


def load(setting: Setting) -> nn.Module:
    """The base, on the device where it is trained.

    Raises:
        IsolateError: There is none, or no such device.
    """
    if device(setting) == "cuda" and torch.cuda.device_count() != 1:
        raise IsolateError(
            f"device='cuda' sees {torch.cuda.device_count()} GPUs, and one is used: set CUDA_VISIBLE_DEVICES=0, or "
            "pass --device cpu"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=getattr(torch, setting.dtype))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise IsolateError(
            f"model={setting.model!r} cannot be loaded ({reason}): pass a folder or a Hub id"
        ) from error
    return model.to(device(setting))


def device(setting: Setting) -> str:
    """ "cuda" or "cpu"."""
    if setting.device != "auto":
        return setting.device
    return "cuda" if torch.cuda.is_available() else "cpu"


class Watch(TrainerCallback):
    """Asks for the new task's validation every few steps at every place of the dial, and stops once all are there.

    What may be forgotten is asked for at each of these steps where there is a level to read it at, since nobody knows
    before which they will be, and otherwise at the end alone.
    """

    def __init__(self, exam: Exam, model: nn.Module, method: Method, alphas: tuple[float, ...], start: Point) -> None:
        self.exam, self.method, self.alphas = exam, method, alphas
        self.start = learnable(model) if any(alpha != 1.0 for alpha in alphas) else {}
        self.begun = 0  # optimizer steps of the rounds before
        self.points: list[Point] = [{"step": 0, "alpha": alpha, **start} for alpha in alphas]
        self.seconds = 0.0  # of evaluating

    @contextmanager
    def _asking(self, model: nn.Module) -> Iterator[Iterator[float]]:
        """Each α, with the model at it; the time is counted."""
        since = time.perf_counter()

        def each() -> Iterator[float]:
            for alpha in self.alphas:
                with dialled(model, alpha, self.start), reset(model, self.method.reset):
                    yield alpha

        yield each()
        self.seconds += time.perf_counter() - since

    @property
    def reached(self) -> bool:
        """Whether validation has come to the level at each place of the dial."""
        level = target(self.exam.setting)
        best = [max(p["validation"] for p in self.points if p["alpha"] == alpha) for alpha in self.alphas]
        return level is not None and min(best) >= level

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, model, setting = self.begun + state.global_step, kwargs["model"], self.exam.setting
        if self.method.reset_every and step % self.method.reset_every == 0:
            half_reset(model, seed=step)
        if step % setting.every == 0 or step == setting.steps:
            with self._asking(model) as places:
                for alpha in places:
                    point = {"step": step, "alpha": alpha, "validation": finite(self.exam.validation(model))}
                    self.points.append(point | (self.exam.kept(model) if setting.level is not None else {}))
            control.should_training_stop = control.should_training_stop or self.reached

    def finish(self, model: nn.Module) -> None:
        """Ask for the rest, once."""
        last = self.points[-len(self.alphas) :]
        with self._asking(model) as places:
            for alpha, point in zip(places, last, strict=True):
                assert point["alpha"] == alpha
                if self.exam.setting.level is None:
                    point |= self.exam.kept(model)
                point["test"] = self.exam.test(model)


def target(setting: Setting) -> float | None:
    """The level, as a score of which higher is better."""
    return -setting.level if setting.level is not None and setting.lower_is_better else setting.level


def finite(score: float) -> float:
    """The score; that of a model that diverged is the worst there is."""
    return score if math.isfinite(score) else -math.inf


def ask_base(exam: Exam) -> Point:
    """What the model is before anything is trained: the same for every run of a setting."""
    model = load(exam.setting)
    exam.remember(model)
    return {"validation": exam.validation(model), **exam.kept(model)}


def learn(run: Run, exam: Exam, start: Point) -> list[dict[str, Any]]:
    """Make a run.

    Args:
        run: What is trained.
        exam: Of its setting.
        start: What `ask_base` found.

    Returns:
        A row of `results/real.csv` for each place of the dial, see `outcomes`.
    """
    setting, arm = run.setting, Arm.named(run.arm)
    method = METHODS[arm.method]
    anchor = arm.config(
        run.seed, batch_size=setting.batch_size, max_length=setting.anchor_length, n_rows=setting.anchor_rows
    )
    on_gpu = device(setting) == "cuda"
    before = _reserved() if on_gpu else 0
    transformers.set_seed(run.seed)
    model = load(setting)
    batches = Batches(
        exam.training[:MEASURED], exam.tokenizer, batch_size=setting.batch_size, max_length=setting.max_length,
        completion_only=setting.completion_only,
    )  # fmt: skip
    config = method.make(model, run.seed, list(batches))
    if config is not None:
        model = get_peft_model(model, config)
    watch = Watch(exam, model, method, setting.alphas, start)
    since, tokens = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        options = SFTConfig(**arguments(folder, run, method))
        for number in range(method.rounds):
            if number:
                next_round(model)
                watch.begun += setting.steps // method.rounds
            last = number == method.rounds - 1
            options.max_steps = setting.steps - watch.begun if last else setting.steps // method.rounds
            given: dict[str, Any] = {
                "model": model, "processing_class": exam.tokenizer, "callbacks": [watch], "args": options,
                "train_dataset": Dataset.from_list(exam.training),
            }  # fmt: skip
            tokens += int(taught(given, anchor).state.num_input_tokens_seen)
            if watch.reached:
                break
    seconds = time.perf_counter() - since - watch.seconds
    watch.finish(model)
    found = {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "bytes": file_size(model, adapter=config is not None),
        "memory": torch.cuda.max_memory_reserved() - before if on_gpu else None,
        "seconds": round(seconds, 1),
        "tokens": tokens,
    }
    return [row | found for row in outcomes(run, watch.points)]


def arguments(folder: str, run: Run, method: Method) -> dict[str, Any]:
    """What TRL's trainer is told, but for how many steps."""
    setting = run.setting
    schedule = setting.schedule or method.schedule
    return {
        "output_dir": folder, "learning_rate": run.rate, "seed": run.seed, "max_length": setting.max_length,
        "per_device_train_batch_size": setting.batch_size, "gradient_accumulation_steps": setting.accumulation,
        "lr_scheduler_type": schedule, "warmup_steps": 0 if schedule == "constant" else setting.warmup,
        "weight_decay": setting.weight_decay, "max_grad_norm": setting.clip, "bf16": setting.autocast,
        "use_cpu": device(setting) == "cpu", "gradient_checkpointing": setting.checkpointing,
        "completion_only_loss": setting.completion_only, "include_num_input_tokens_seen": "non_padding",
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def outcomes(run: Run, points: list[Point]) -> list[dict[str, Any]]:
    """What came out, one row for each place of the dial.

    Returns:
        Rows of: what was run, `settings` being a digest of all the settings; `reached`, whether validation came to the
        level (nothing without one), and the `steps` at which it did, at which it was best where it did not, or of the
        whole run without a level; there, `validation`, `forgetting`, the mean loss of the tasks' main metrics in
        points, each one as `forgetting:TASK`, `kl` from the base on the new task, and `rise`, of the loss
        on general text; `test` after the last step. Shares are in percent, losses and KL in nats. `learn` adds
        `trained` scalars, `bytes` of the file, `memory` at its peak in bytes (on a GPU), `seconds` of training alone,
        and training `tokens`.
    """
    setting, level = run.setting, target(run.setting)
    rows = []
    for alpha in setting.alphas:
        curve = [point for point in points if point["alpha"] == alpha]
        place, reached = float(len(curve) - 1), None
        if level is not None:
            validation = [point["validation"] for point in curve]
            place, reached = place_of(validation, level), max(validation) >= level
        at = {name: interpolated(curve, name, place) for name in curve[0] if name != "alpha"}
        lost = {task: round(100 * (curve[0][task] - at[task]), 2) for task in setting.tasks}
        row = key(run, alpha) | {"reached": reached, "steps": round(at["step"], 1)}
        row |= {"validation": shown(setting, at["validation"]), "test": shown(setting, curve[-1]["test"])}
        row |= {"forgetting": round(sum(lost.values()) / len(lost), 2) if lost else None}
        row |= {"kl": round(at["kl"], 4)}
        row |= {"rise": round(curve[0]["general"] - at["general"], 4) if "general" in at else None}
        rows.append(row | {f"forgetting:{task}": points for task, points in lost.items()})
    return rows


def key(run: Run, alpha: float) -> dict[str, Any]:
    """The columns that make a row one and the same."""
    setting = run.setting
    made_of = {"model": setting.model, "data": setting.data, "settings": setting.digest}
    return made_of | {"arm": run.arm, "rate": run.rate, "seed": run.seed, "alpha": alpha}


def shown(setting: Setting, score: float) -> float:
    """A score as it is written down: percent, or the loss in nats."""
    return round(-score, 4) if setting.lower_is_better else round(100 * score, 2)


def _reserved() -> int:
    """GPU memory in use before a run; its peak is counted from here."""
    gc.collect()  # a model and its trainer know each other
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()
