"""`HalfFTConfig`: what a user says to train a random half."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from types import UnionType
from typing import ClassVar, Literal, get_args

from peft.utils import PeftType
from torch import nn

from ...deltas import DeltaConfig
from ...deltas.targets import candidates, in_layers, targeted_parameters
from ...errors import IsolateError, RegionError
from ...regions.region import Region
from ...regions.roles import Role
from .draw import MATRICES, Balance, Granularity, category, draw, members, union


@dataclass
class HalfFTConfig(DeltaConfig):
    """Half Fine-Tuning (HFT, arXiv 2404.18466): train a random half of the weight matrices, leave the rest as it is.

    Before each *round* (an SFT stage, a DPO stage, a task of a sequence) a fresh half is drawn and stays fixed in the
    round. In every layer 2 of {q, k, v, o} learn; 2 of {gate, up, down} in a random half of the layers and 1 in the
    others; 1 of the 2 norms. The final norm always learns (our choice: the paper does not say).

    In a mixture of experts each expert of each layer is drawn from like a layer, and its router counts as a norm; of
    the matrices of a linear attention or state-space mixer half is drawn. An encoder–decoder is drawn from in both
    stacks, a vision-language model in its language model only: name the other towers by `target_modules`.

    Use full fine-tuning's learning rate, not LoRA's: 1e-5 to 4e-5 for SFT, 5e-7 to 1e-6 for DPO. The other fields are
    those of `DeltaConfig`.

    Args:
        fraction: Share of the members that learns, in (0, 1]. 0.4 to 0.6 is flat in the paper, 0.5 best.
        granularity: "category" (the paper's best), "layer" (whole layers) or "model" (any matrices).
        balance: "count" draws matrices by number, as the paper. "parameters" pairs large with small ones, for
            grouped-query attention, where q and o are several times as large as k and v.
        round_index: Number of the round: another one draws another half.
        seed: Seed of the draw. The draw depends on this seed and on no other, not on the trainer's.
        train_embeddings: False: embeddings and head stay (a smaller file). True: both learn, as in the paper, where
            freezing them hurts; TRL's trainers refuse an adapter on the head, so this is for the plain `Trainer`.
            "input": the input embeddings only, which TRL accepts.

    Example:
        >>> HalfFTConfig(seed=1).fraction
        0.5
    """

    fraction: float = field(default=0.5)
    granularity: str = field(default="category")
    balance: str = field(default="count")
    round_index: int = field(default=0)
    seed: int = field(default=0)
    train_embeddings: bool | Literal["input"] = field(default=False)

    title: ClassVar[str] = "Half Fine-Tuning (HFT)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.18466"
    chosen_by: ClassVar[tuple[str, ...]] = (
        "fraction", "granularity", "balance", "round_index", "seed", "train_embeddings",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("HALFFT")
        if not _is_number(self.fraction, int | float) or not 0.0 < self.fraction <= 1.0:
            raise IsolateError(
                f"fraction={self.fraction!r} is no share of the matrices: use a number above 0 and up to 1, like 0.5"
            )
        for name, allowed in (("granularity", get_args(Granularity)), ("balance", get_args(Balance))):
            if getattr(self, name) not in allowed:
                raise IsolateError(f"{name}={getattr(self, name)!r} is unknown: use one of {allowed}")
        if not isinstance(self.train_embeddings, bool) and self.train_embeddings != "input":
            raise IsolateError(f"train_embeddings={self.train_embeddings!r} is unknown: use False, 'input' or True")
        if self.train_embeddings and self.names_its_pool:
            raise IsolateError(
                f"train_embeddings={self.train_embeddings!r} has no effect where target_modules or target_parameters "
                "is set: name the embedding among them, or leave them out"
            )
        for name in ("round_index", "seed"):
            if not _is_number(getattr(self, name), int) or getattr(self, name) < 0:
                raise IsolateError(f"{name}={getattr(self, name)!r} must be a whole number from 0 up")

    def choose(self, model: nn.Module) -> Region:
        """Draw the half of this round, see `draw`. With `target_modules`, among the modules named."""
        every = candidates(model, self)
        if self.names_its_pool:
            names = targeted_parameters(model, self)
            pool = [role for role in every if role.parameter in names]
            always: list[Role] = []
        else:
            pool = self._pool_by_role(every, type(model).__name__)
            learning = self._always_learn()
            always = [role for role in every if role.layer is None and not role.tower and role.name in learning]
        drawn = draw(
            members(pool),
            fraction=self.fraction,
            granularity=self.granularity,  # type: ignore[arg-type]  # checked in __post_init__
            balance=self.balance,  # type: ignore[arg-type]
            seed=self.seed,
            round_index=self.round_index,
        )
        return drawn | union(members(always))

    def _pool_by_role(self, every: list[Role], model: str) -> list[Role]:
        """What is drawn from where the user names nothing: the matrices and norms in the layers of the main tower."""
        inside = [role for role in every if role.layer is not None and not role.tower and in_layers(self, role)]
        pool = [role for role in inside if category(role) != "other"]
        matrices = [role for role in inside if len(role.selection.shape) > 1]
        unknown = [role for role in matrices if role.name == "unknown"]
        remedy = "name what to draw from by target_modules, like 'all-linear', or by target_parameters"
        if not any(role.name in MATRICES for role in matrices):
            raise RegionError(f"no attention or feed-forward was recognised in {model}: {remedy}")
        share = sum(role.selection.count for role in unknown) / sum(role.selection.count for role in matrices)
        # Less than that is a detail, such as T5's bias by distance: the half is still half of the model.
        if share >= 0.01:
            warnings.warn(
                f"{share:.0%} of the scalars in the layers of {model} were not recognised, such as "
                f"{unknown[0].parameter!r}, and stay frozen: the half is drawn from the rest. If that is not what you "
                f"want, {remedy}",
                UserWarning,
                stacklevel=2,
            )
        return pool

    def _always_learn(self) -> set[str]:
        """Roles outside the layers that learn without a draw."""
        # Where the user asks for certain layers, the final norm is in none of them.
        learning = set() if self.layers_to_transform is not None else {"norm"}
        if self.train_embeddings:
            learning.add("embedding")
        if self.train_embeddings is True:
            learning.add("head")
            warnings.warn(
                "train_embeddings=True puts a delta on the language-model head, which TRL's trainers refuse: with "
                "SFTTrainer or DPOTrainer use train_embeddings='input'; True is for transformers' plain Trainer",
                UserWarning,
                stacklevel=2,
            )
        return learning


def _is_number(value: object, kind: type | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
