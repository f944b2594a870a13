"""One run: a base learns one task in one way, by TRL's trainer, and is evaluated until it can do it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from abilities import ABILITIES, TASKS, Row, Split
from arms import IMPORTANCE_ROWS, METHODS, Arm, Method, old_rows
from bases import folder_of, general, rendered
from datasets import Dataset
from measure import Questions
from outcomes import around, place_of
from peft import PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from protocol import BATCH, ENOUGH, EVALUATED, EVERY, JUDGED_STEPS, OTHER_BASE, STEPS, TRAINED, WARMUP
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from peft_isolate import AnchorConfig, half_reset, next_round, set_scale
from peft_isolate.deltas.reference import Reference
from peft_isolate.training import AnchoredSFTTrainer


@dataclass(frozen=True)
class Run:
    """What is trained, and by what it is evaluated.

    Attributes:
        base: See `bases.py`.
        task: A key of `TASKS`.
        arm: Name of an `Arm`.
        rate: Learning rate.
        seed: Of the data's order and of what the method draws.
        judged: Old abilities are evaluated on the test split; otherwise on the one to choose by.
        alphas: Where the dial stands when it is evaluated, 1 first.
        patient: It may take as many steps to choose by as a judged one.
    """

    base: str
    task: str
    arm: str
    rate: float
    seed: int
    judged: bool = False
    alphas: tuple[float, ...] = (1.0,)
    patient: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        arm = (
            self.arm.replace(" | ", "+").replace(", ", ",").replace(" ", "_").replace("½", "0.5").replace("¾", "0.75")
        )
        split = "test" if self.judged else "validation"
        more = ("" if self.alphas == (1.0,) else "-dial") + ("-patient" if self.patient else "")
        return f"{self.base}-{self.task}-{arm}-{self.rate:g}-{self.seed}-{split}{more}"


class Exam:
    """Everything that is asked of a model.

    Args:
        base: How rows are rendered.
        tasks: Keys of `TASKS`.
        judged: Scores are of the test split; otherwise of the one to choose by.
        tokenizer: The base's.

    Attributes:
        validation: {task: its questions by which a training ends}.
    """

    def __init__(self, base: str, tasks: Iterable[str], judged: bool, tokenizer: Any) -> None:
        split: Split = "test" if judged else "validation"
        ask = lambda rows: Questions(rendered(base, rows), tokenizer)  # noqa: E731
        self.validation = {task: ask(TASKS[task].rows("validation", EVALUATED)) for task in tasks}
        self.tasks = {task: ask(TASKS[task].rows(split, EVALUATED)) for task in tasks}
        self.old = {ability.name: ask(ability.rows(split, EVALUATED)) for ability in ABILITIES}
        self.general = Questions(general(base, split, EVALUATED), tokenizer, whole=True)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """{task and ability: exact match from 0 to 1; "old": mean of the abilities'; "general": loss in nats}."""
        shares = {name: questions.exact_match(model) for name, questions in {**self.tasks, **self.old}.items()}
        old = statistics.fmean(shares[name] for name in self.old)
        return {**shares, "old": old, "general": self.general.loss(model)}


class Curve(TrainerCallback):
    """Asks every few steps, at every place of the dial, how well the task is learned, and stops once it is at each.

    The rest is asked by `settle`, where an outcome will be read: as much again as the training otherwise takes.
    """

    def __init__(self, exam: Exam, model: nn.Module, base: Reference, run: Run, method: Method) -> None:
        self.exam, self.base, self.run, self.method = exam, base, run, method
        self.validation = exam.validation[run.task]
        self.start = learnable(model)
        self.begun = 0  # optimizer steps of the rounds before
        self.points: list[dict[str, Any]] = []
        self.kept: dict[int, dict[str, torch.Tensor]] = {}  # what is trained, after the steps of this round
        self.seconds = 0.0  # of evaluating
        self.record(model, 0)

    def record(self, model: nn.Module, step: int) -> None:
        """Ask at each α how well the task is learned, and keep the model as it is for `settle`."""
        since = time.perf_counter()
        self.kept[step] = learnable(model)
        for alpha in self.run.alphas:
            with dialled(model, alpha, self.start), reset(model, self.method.reset):
                self.points.append({"step": step, "alpha": alpha, "validation": self.validation.exact_match(model)})
        self.seconds += time.perf_counter() - since

    def settle(self, model: nn.Module) -> None:
        """A round has ended: ask everything around the places that outcomes are read at, and after the last step."""
        since = time.perf_counter()
        now = learnable(model)
        steps = list(dict.fromkeys(point["step"] for point in self.points))
        read = {0, len(steps) - 1}
        for alpha in self.run.alphas:
            read.update(around(place_of([p["validation"] for p in self.points if p["alpha"] == alpha])))
        wanted = {steps[place] for place in read} & self.kept.keys()
        for point in [point for point in self.points if point["step"] in wanted and "old" not in point]:
            _put(model, self.kept[point["step"]])
            with dialled(model, point["alpha"], self.start), reset(model, self.method.reset):
                point |= self.asked(model)
        _put(model, now)
        self.kept.clear()
        self.seconds += time.perf_counter() - since

    def asked(self, model: nn.Module) -> dict[str, float]:
        """All else; `new` is how well the task is learned on the split of the run, KL is from the base, in nats."""
        scores = self.exam(model)
        return {"new": scores.pop(self.run.task), "kl": self.validation.divergence(model, self.base), **scores}

    @property
    def reached(self) -> bool:
        """Whether the task has been learned at each place of the dial."""
        best = [max(p["validation"] for p in self.points if p["alpha"] == alpha) for alpha in self.run.alphas]
        return min(best) >= ENOUGH

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, model = self.begun + state.global_step, kwargs["model"]
        if self.method.reset_every and step % self.method.reset_every == 0:
            half_reset(model, seed=step)
        if step % EVERY == 0:
            self.record(model, step)
            control.should_training_stop = control.should_training_stop or self.reached


@contextmanager
def dialled(model: nn.Module, alpha: float, start: dict[str, torch.Tensor]) -> Iterator[None]:
    """The model at W0 + α·Δ: by the library, by PEFT for LoRA, by interpolation where there is no adapter."""
    if alpha == 1.0:
        yield
    elif not isinstance(model, PeftModel):
        tuned = _numbers(model, start)
        _put(model, {name: start[name] + alpha * (tuned[name] - start[name]) for name in start})
        try:
            yield
        finally:
            _put(model, tuned)
    elif str(model.peft_config["default"].peft_type.value) == "LORA":
        with rescale_adapter_scale(model, alpha):
            yield
    else:
        set_scale(model, alpha)
        try:
            yield
        finally:
            set_scale(model, 1.0)


@contextmanager
def reset(model: nn.Module, wanted: bool) -> Iterator[None]:
    """The model with half of its difference put back to the base, and afterwards as it was."""
    if not wanted:
        yield
        return
    kept = learnable(model)
    half_reset(model)
    try:
        yield
    finally:
        _put(model, kept)


def learnable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what is trained, by name."""
    return _numbers(model, [name for name, p in model.named_parameters() if p.requires_grad])


def _numbers(model: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name in names}


@torch.no_grad()
def _put(model: nn.Module, numbers: Mapping[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        if name in numbers:
            p.copy_(numbers[name])


def load(folder: Path, seed: int) -> tuple[Any, Any]:
    """(the base in fp32, its tokenizer), all random states seeded."""
    transformers.set_seed(seed)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def wrapped(model: Any, method: Method, seed: int, rows: Sequence[Row], tokenizer: Any) -> Any:
    """The model with the adapter of a method, if it has one; what is measured for it is measured on the first rows."""
    config = method.make(model, seed, Questions(rows[:IMPORTANCE_ROWS], tokenizer).batches)
    return model if config is None else get_peft_model(model, config)


def arguments(folder: str, rate: float, seed: int, method: Method) -> dict[str, Any]:
    """What TRL's trainers are told, whatever they train, but for how many steps."""
    return {
        "output_dir": folder, "learning_rate": rate, "seed": seed, "max_length": 32, "weight_decay": 0.0,
        "lr_scheduler_type": method.schedule, "warmup_steps": 0 if method.schedule == "constant" else WARMUP,
        "per_device_train_batch_size": BATCH * (1 + method.replayed), "bf16": False, "use_cpu": True,
        "report_to": "none", "gradient_checkpointing": False, "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True,
    }  # fmt: skip


def taught(given: Mapping[str, Any], anchor: AnchorConfig | None) -> SFTTrainer:
    """TRL's trainer with these arguments, anchored or not, once it has trained without printing."""
    trainer = SFTTrainer(**given) if anchor is None else AnchoredSFTTrainer(**given, anchor=anchor)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def learn(run: Run, bases: Path | None = None) -> dict[str, Any]:
    """Make a run, with a base from a folder of bases, or from where it lies.

    Returns:
        {"points": one mapping for each evaluation and α, of how well the task is learned and, around the places that
        `outcomes` reads, of all scores, "trained": scalars, "bytes": of these in
        fp32, "seconds": of training, without evaluations, "steps"}.
    """
    began = time.perf_counter()
    arm = Arm.named(run.arm)
    method, anchor = METHODS[arm.method], arm.config(run.seed)
    model, tokenizer = load(folder_of(run.base, bases), run.seed)
    rows = rendered(run.base, TASKS[run.task].rows("train", TRAINED, seed=run.seed))
    model = wrapped(model, method, run.seed, rows, tokenizer)
    exam = Exam(run.base, [run.task], run.judged, tokenizer)
    base = Reference.now(model)
    curve = Curve(exam, model, base, run, method)
    # A rate that is 0 by `STEPS` has nothing to gain after it; on the large base more would take too long.
    longer = (run.judged or run.patient) and method.schedule != "linear" and run.base != OTHER_BASE
    steps = JUDGED_STEPS if longer else STEPS
    if method.replayed:  # by other rows in every step
        rows = rows * max(1, steps * BATCH // len(rows))
        rows += rendered(run.base, old_rows(len(rows) * method.replayed, run.seed))
    with tempfile.TemporaryDirectory() as folder:
        options = SFTConfig(**arguments(folder, run.rate, run.seed, method), max_steps=steps)
        for number in range(method.rounds):
            if number:
                next_round(model)
                curve.begun += method.round_steps
            options.seed = run.seed + 1000 * number  # no round sees the rows in the order of the one before
            options.max_steps = steps - curve.begun if number == method.rounds - 1 else method.round_steps
            given: dict[str, Any] = {"args": options, "train_dataset": Dataset.from_list(rows), "callbacks": [curve]}
            given |= {"model": model, "processing_class": tokenizer}
            taught(given, anchor)
            curve.settle(model)
            if curve.reached:
                break
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "points": curve.points,
        "trained": trained,
        "bytes": 4 * trained,
        "steps": curve.points[-1]["step"],
        "seconds": time.perf_counter() - began - curve.seconds,
    }
