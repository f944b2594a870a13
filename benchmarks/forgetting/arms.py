"""The arms: every method in a line, by the public config that a user would write.

A method is a function of the model and a seed that gives a PEFT config; None is full fine-tuning. An arm is a method
with an anchor, written "HFT | self 1". A run's seed is the trainer's, and that of what a method draws; "HFT, one draw"
has the same draw whatever the trainer's is.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from abilities import Row, mixture
from peft import LoraConfig, OSFConfig, PeftConfig, ShiraConfig
from protocol import BATCH, FULL_RATES, LOW_RANK_RATES, SPARSE_RATES
from torch import nn

from peft_isolate import (
    AnchorConfig,
    CoFiTuneConfig,
    CoreIsolationConfig,
    HalfFTConfig,
    Region,
    measure_importance,
    plan,
)
from peft_isolate.regions.selection import Selection

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]

# (model, seed, batches of the new task's training rows) → config.
Make = Callable[[nn.Module, int, list[dict[str, Any]]], PeftConfig | None]


@dataclass(frozen=True)
class Method:
    """How a model is trained on one new task.

    Attributes:
        make: Its config.
        rates: Learning rates to choose from.
        rounds: Rounds of HFT; a new half is drawn every `round_steps`.
        round_steps: Optimizer steps of a round but the last, which goes on.
        reset_every: Full fine-tuning's difference is half reset every so many steps; 0: never.
        reset: It is evaluated, and would be kept, half reset.
        replayed: Rows of the base's own training mixture beside each row of the new task.
        charged: Steps that what it measures beforehand is as dear as.
        schedule: Of the learning rate, by transformers' name.
        why: What the arm is for.
    """

    make: Make
    why: str
    rates: tuple[float, ...] = FULL_RATES
    rounds: int = 1
    round_steps: int = 60
    reset_every: int = 0
    reset: bool = False
    replayed: int = 0
    charged: int = 0
    schedule: str = "constant_with_warmup"


def half(**options: Any) -> Make:
    """HFT, with a draw of its own for every seed."""
    return lambda model, seed, batches: HalfFTConfig(seed=seed, **options, **CAUSAL)


# Of the new task, what a mask is measured on: two passes forward and backward, as dear as so many steps.
IMPORTANCE_ROWS = 128
MASKED = 2 * IMPORTANCE_ROWS // BATCH


def cofitune(soft_mask: str | None = None, **options: Any) -> Make:
    """CoFiTune; with a mask, importance is measured on the new task's training rows, as in the paper."""

    def make(model: nn.Module, seed: int, batches: list[dict[str, Any]]) -> PeftConfig:
        importance = measure_importance(model, batches) if soft_mask is not None else None
        return CoFiTuneConfig(importance=importance, soft_mask=soft_mask, **options, **CAUSAL)

    return make


def low_rank(r: int, target_modules: list[str] | str) -> Make:
    return lambda model, seed, batches: LoraConfig(
        r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules=target_modules, **CAUSAL
    )


def region(choose: Callable[[nn.Module, random.Random], Region]) -> Make:
    """A region of one's own, which `CoreIsolationConfig` trains like any core."""
    return lambda model, seed, batches: CoreIsolationConfig(
        train="core", core=choose(model, random.Random(f"region {seed}")), **CAUSAL
    )


def _matrices(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the matrices of the layers."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}


def _layers(start: float, end: float) -> Callable[[nn.Module, random.Random], Region]:
    """Whole layers, between two shares of the depth."""

    def choose(model: nn.Module, rng: random.Random) -> Region:
        depth = model.config.num_hidden_layers
        wanted = tuple(f".layers.{i}." for i in range(int(start * depth), int(end * depth)))
        named = {name: p for name, p in model.named_parameters() if any(layer in name for layer in wanted)}
        return Region({name: Selection.whole(tuple(p.shape)) for name, p in named.items()})

    return choose


def _random_rows(model: nn.Module, rng: random.Random) -> Region:
    """Half of the rows of every matrix."""
    return Region(
        {name: Selection.rows(shape, sorted(rng.sample(range(shape[0]), shape[0] // 2)))
         for name, shape in _matrices(model).items()}
    )  # fmt: skip


def _random_elements(share: float) -> Callable[[nn.Module, random.Random], Region]:
    """This share of the scalars of every matrix."""

    def choose(model: nn.Module, rng: random.Random) -> Region:
        sizes = {name: shape[0] * shape[1] for name, shape in _matrices(model).items()}
        return Region(
            {name: Selection.elements(shape, sorted(rng.sample(range(sizes[name]), round(share * sizes[name]))))
             for name, shape in _matrices(model).items()}
        )  # fmt: skip

    return choose


def _random_range(model: nn.Module, seed: int, batches: list[dict[str, Any]]) -> PeftConfig:
    """Up and down of as many neighbouring layers as the paper's range has, begun elsewhere; one may be in both."""
    n_layers = model.config.num_hidden_layers
    wide = max(1, n_layers // 4)
    first = random.Random(f"range {seed}").choice([i for i in range(n_layers - wide + 1) if i != n_layers // 4])
    return CoFiTuneConfig(layer_range=(first / n_layers, (first + wide) / n_layers), soft_mask=None, **CAUSAL)


def _as_many_matrices(model: nn.Module, rng: random.Random) -> Region:
    """As many scalars as the paper's region has, in matrices of the feed-forward drawn from all layers."""
    wanted = plan(model, CoFiTuneConfig(soft_mask=None, **CAUSAL)).region
    same = [name for name, shape in _matrices(model).items() if ".mlp." in name]
    drawn = rng.sample(same, len(wanted))
    return Region({name: Selection.whole(_matrices(model)[name]) for name in drawn})


def _config(config: PeftConfig) -> Make:
    """The same for every model and seed; a config remembers its model, so each run has a copy."""
    return lambda model, seed, batches: copy.deepcopy(config)


METHODS: dict[str, Method] = {
    "full": Method(lambda *_: None, "what people do today"),
    "full, embeddings frozen": Method(_config(CoreIsolationConfig(**CAUSAL)), "what every region here leaves alone"),
    "full, no warm-up": Method(lambda *_: None, "tuned over its schedule: no warm-up", schedule="constant"),
    "full, linear decay": Method(lambda *_: None, "tuned over its schedule: down to 0 at step 400", schedule="linear"),
    # LoRA, over r and targets.
    "LoRA r=8": Method(low_rank(8, "all-linear"), "what people do today, too", LOW_RANK_RATES),
    "LoRA r=32": Method(low_rank(32, "all-linear"), "LoRA tuned over r", LOW_RANK_RATES),
    "LoRA r=8, attention": Method(low_rank(8, ATTENTION), "LoRA tuned over targets", LOW_RANK_RATES),
    "LoRA r=8, MLP": Method(low_rank(8, MLP), "LoRA tuned over targets", LOW_RANK_RATES),
    # HFT.
    "HFT": Method(half(), "the paper's default: a half of each category"),
    "HFT, layers": Method(half(granularity="layer"), "its granularity: half of the layers, each whole"),
    "HFT, model": Method(half(granularity="model"), "its granularity: half of all matrices, whichever"),
    "HFT, 0.3": Method(half(fraction=0.3), "its fraction: 0.3 of each category"),
    "HFT, 0.4": Method(half(fraction=0.4), "its fraction"),
    "HFT, 0.6": Method(half(fraction=0.6), "its fraction"),
    "HFT, 0.7": Method(half(fraction=0.7), "its fraction"),
    "HFT, 3 rounds": Method(half(), "a new half after 60 steps, and after 120", rounds=3),
    "HFT, embeddings": Method(
        half(train_embeddings="input"), "the paper trains them; TRL's loss allows no adapter on the head"
    ),
    "HFT, one draw": Method(
        lambda *_: HalfFTConfig(seed=0, **CAUSAL), "the same half for every seed: how much of the spread is the draw's"
    ),
    "random rows": Method(region(_random_rows), "control of HFT: halves of matrices, not half of the matrices"),
    "random elements": Method(region(_random_elements(0.5)), "control of HFT: half of the scalars"),
    "first half": Method(region(_layers(0, 0.5)), "control of HFT: the lower layers, whole"),
    "last half": Method(region(_layers(0.5, 1)), "control of HFT: the upper layers, whole"),
    "full, half reset": Method(
        _config(CoreIsolationConfig(**CAUSAL)), "the pilot of HFT's paper: all but embeddings, then half put back",
        reset=True,
    ),
    "full, reset every 20": Method(
        _config(CoreIsolationConfig(**CAUSAL)), "the pilot, all along: all but embeddings, half put back every 20",
        reset_every=20,
    ),
    # CoFiTune.
    "CoFiTune, no mask": Method(cofitune(), "the paper's region alone"),
    "CoFiTune": Method(cofitune("update"), "the paper's region, the update damped", charged=MASKED),
    "CoFiTune, gradient": Method(cofitune("gradient"), "the mask as the paper and its code have it", charged=MASKED),
    "CoFiTune, (½, ¾]": Method(cofitune(layer_range=(0.5, 0.75)), "another quarter of the layers"),
    "CoFiTune, (0, ½]": Method(cofitune(layer_range=(0, 0.5)), "the broad range that its search found best here"),
    "CoFiTune, (0, ¼]": Method(cofitune(layer_range=(0, 0.25)), "another quarter of the layers"),
    "CoFiTune, (¾, 1]": Method(cofitune(layer_range=(0.75, 1)), "another quarter of the layers"),
    "CoFiTune, MHA": Method(cofitune(modules="MHA"), "other modules: the search holds them against up and down"),
    "random range": Method(_random_range, "control of CoFiTune: as many neighbouring layers, begun elsewhere"),
    "random matrices": Method(region(_as_many_matrices), "control of CoFiTune: as many matrices, of any layers"),
    # Peers.
    "random 1 %": Method(region(_random_elements(0.01)), "as few scalars as a core has", SPARSE_RATES),
    "SHiRA": Method(
        lambda model, seed, _: ShiraConfig(r=8, random_seed=seed, target_modules=ATTENTION + MLP, **CAUSAL),
        "a peer: sparse elements, as many numbers as LoRA of r = 8", SPARSE_RATES,
    ),
    "OSF": Method(
        lambda *_: OSFConfig(target_modules=ATTENTION + MLP, **CAUSAL), "a peer: the small singular directions learn"
    ),
    "replay": Method(lambda *_: None, "with old data: as many old rows as new ones, mixed", replayed=1),
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A method with an anchor.

    Attributes:
        method: A key of `METHODS`.
        anchor: "none", or source and β: "random 1", "self 3". "own" are old rows, which most users do not have.
    """

    method: str
    anchor: str = "none"

    @classmethod
    def named(cls, name: str) -> Arm:
        """Of "HFT | self 1" or "HFT"."""
        method, _, anchor = name.partition(" | ")
        return cls(method, anchor or "none")

    @property
    def name(self) -> str:
        return self.method if self.anchor == "none" else f"{self.method} | {self.anchor}"

    def config(
        self, seed: int, batch_size: int = BATCH, max_length: int = 16, n_rows: int = 1000
    ) -> AnchorConfig | None:
        """What its trainer takes as `anchor=`."""
        if self.anchor == "none":
            return None
        source, beta = self.anchor.split()
        text: Any = mixture("train", 2000, seed=9) if source == "own" else source
        return AnchorConfig(
            text, beta=float(beta), batch_size=batch_size, max_length=max_length, n_rows=n_rows, seed=seed
        )


def old_rows(count: int, seed: int) -> list[Row]:
    """What replay replays."""
    return mixture("train", count, seed=1000 + seed)
