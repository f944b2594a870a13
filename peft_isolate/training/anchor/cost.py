"""What an anchor will cost, before anything is trained: tokens, time, memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...deltas.about.text import size_text
from ...deltas.layer import DeltaLayer
from ...deltas.reference import Reference, bytes_to_copy, unwrapped
from ...evaluation.divergence import positions_at_once
from ...evaluation.rows import flag, positive
from ...regions.region import base_module, logical_shape, unwrap, walk_parameters
from ...regions.tree import head_of
from .config import SELF, AnchorConfig, check_config
from .vocabulary import embedded

# Of one chunk, at its peak: both models' logits as the head gives them, and in fp32 both models' log-probabilities and
# their difference, and in one byte what the reference rules out. A test counts them.
_IN_DTYPE, _IN_FP32, _IN_BYTES = 2, 3, 1
_WRAPPERS: Any = (BaseTunerLayer, AuxiliaryTrainingWrapper)


@dataclass(frozen=True)
class AnchorCost:
    """What an anchor will cost: `print(anchor_cost(model, config, tokens_per_step))`. All numbers are of one process.

    Attributes:
        tokens: Anchor tokens of an optimizer step, as a mean over the steps that are not anchored, too; fewer where
            rows are shorter than `max_length`.
        share: Time of the anchor's forwards and backward as a share of the new task's, likewise; 0.25 is a quarter
            more. The optimizer's time, which is the same with an anchor, is not in it.
        reference_bytes: Of the numbers that are kept of the reference: 0 for a fresh adapter of this library, and for
            fresh plain LoRA.
        logits_bytes: Of the logits of a chunk of positions, at the peak, and of all that is computed from them.
        sampled_tokens: To be sampled once, before training, for "self"; fewer where rows end early.
        tokens_per_step: Tokens of the new task in an optimizer step, as given.
        positions: Positions in a chunk.
    """

    tokens: float
    share: float
    reference_bytes: int
    logits_bytes: int
    sampled_tokens: int
    tokens_per_step: int
    positions: int

    def __str__(self) -> str:
        lines = [
            f"anchor    at most {_few(self.tokens)} tokens a step, beside {self.tokens_per_step:,} of the new task",
            f"time      +{_few(100 * self.share)}% of a step's forward and backward",
            f"memory    {size_text(self.reference_bytes)} for the reference, {size_text(self.logits_bytes)} for the "
            f"logits of {self.positions:,} positions at once",
        ]
        if self.sampled_tokens:
            lines.append(f"before    at most {self.sampled_tokens:,} tokens are sampled, once")
        return "\n".join(lines)


def anchor_cost(
    model: nn.Module,
    config: AnchorConfig,
    tokens_per_step: int,
    *,
    checkpointing: bool = False,
    reference: Reference | None = None,
) -> AnchorCost:
    """Estimate what an anchor costs, from the sizes of the model's matrices: nothing is run.

    A product with a matrix counts as many units as it has scalars, once in forward, once in backward for the gradient
    of its input where anything in front learns, once for its own where it learns. A token of the new task takes
    forward and backward; an anchor token a forward of the reference more. Where everything learns that is 4 against 3,
    with gradient checkpointing 5 against 4. The head is applied once more to both models where there are more
    positions than one chunk has.

    Attention's own products and everything that is no product of matrices are left out: they are about the same share
    of both. Every expert counts for every token.

    Args:
        model: As it will be trained, with its adapter. Not changed.
        config: The anchor.
        tokens_per_step: Tokens of the new task in an optimizer step of one process: rows × their length ×
            accumulation.
        checkpointing: Whether training uses gradient checkpointing.
        reference: What the model will be held to, where it has been made; None counts what `Reference.now`
            would copy.

    Raises:
        IsolateError: `config` is no `AnchorConfig`; `tokens_per_step` is no whole number above zero; the model has no
            input embedding; or as `Reference.now` raises.
    """
    check_config(config)
    positive("tokens_per_step", tokens_per_step)
    flag("checkpointing", checkpointing)
    work = _Work.of(model)
    if config.beta == 0:
        return AnchorCost(0.0, 0.0, 0, 0, 0, tokens_per_step, 0)
    rows_length = config.batch_size * (config.max_length - 1)
    positions = min(positions_at_once(work.vocabulary), rows_length)
    tokens = config.batch_size * config.max_length / config.every
    new = work.step(checkpointing)
    again = 2 * work.head if rows_length > positions else 0
    return AnchorCost(
        tokens=tokens,
        share=tokens / tokens_per_step * (work.forward + new + again) / new,
        reference_bytes=bytes_to_copy(model) if reference is None else reference.n_bytes,
        logits_bytes=positions * work.vocabulary * (_IN_FP32 * 4 + _IN_DTYPE * work.itemsize + _IN_BYTES),
        sampled_tokens=config.n_rows * config.max_length if config.source == SELF else 0,
        tokens_per_step=tokens_per_step,
        positions=positions,
    )


def _few(number: float) -> str:
    """Without digits behind the point, unless two figures need them."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


class _Work(NamedTuple):
    """Scalars of the matrices that a token is multiplied with.

    Attributes:
        body: All but the head's.
        head: The head's.
        behind: Those of both through which a gradient goes back to something that learns.
        learning: Those whose own gradient is computed; of an adapter beside a matrix, such as LoRA, the adapter's.
        vocabulary: Rows of the head.
        itemsize: Bytes of a number that the head gives.
    """

    body: int
    head: int
    behind: int
    learning: int
    vocabulary: int
    itemsize: int

    @property
    def forward(self) -> int:
        """Units of a forward of one token."""
        return self.body + self.head

    def step(self, checkpointing: bool) -> int:
        """Units of a forward and backward of one token."""
        # With checkpointing trainers let the gradient go back to the embedding, whatever learns.
        backward = self.behind if not checkpointing else self.forward + self.body
        return self.forward + backward + self.learning

    @classmethod
    def of(cls, model: nn.Module) -> _Work:
        inner: Any = unwrap(unwrapped(model))
        vocabulary, embedding = embedded(inner)
        output = head_of(inner)
        head: Any = None if output is None else base_module(output).weight
        around = {id(base_module(module)): module for module in inner.modules() if isinstance(module, _WRAPPERS)}
        body = of_head = behind = learning = 0
        anything = False
        for name, _, module, parameter in walk_parameters(inner):
            leaf = name.rpartition(".")[2]
            shape = logical_shape(module, leaf, parameter)
            scalars = math.prod(shape) if len(shape) > 1 else 0
            learns = _learning(around.get(id(module)), leaf, parameter, scalars)
            if parameter is head:
                # The embedding, too, where it is tied; the gradient goes through the head whatever learns.
                vocabulary, of_head = shape[0], scalars
                behind += scalars
            elif parameter is embedding:
                learns = None if learns is None else 0  # it is looked up
            else:
                body += scalars
                behind += scalars if anything else 0
            learning += learns or 0
            anything = anything or learns is not None
        itemsize = (embedding if head is None else head).element_size()
        return cls(body, of_head, behind, learning, vocabulary, itemsize)


def _learning(wrapper: Any, name: str, parameter: nn.Parameter, scalars: int) -> int | None:
    """Scalars whose gradient a parameter of a module costs, with what an adapter has beside it; None: nothing learns.

    Args:
        wrapper: Around the module, where there is one.
        name: The parameter's in the module.
        parameter: It.
        scalars: That it has, if it is a matrix.
    """
    if parameter.requires_grad:
        return scalars
    if isinstance(wrapper, DeltaLayer):
        deltas = wrapper.deltas(name).values() if name in wrapper.parameter_names else ()
        return scalars if any(p.requires_grad for delta in deltas for p in delta.parameters()) else None
    if wrapper is None or name != "weight":
        return None
    beside = [p.numel() for p in wrapper.parameters() if p.requires_grad]
    return sum(beside) if beside else None
