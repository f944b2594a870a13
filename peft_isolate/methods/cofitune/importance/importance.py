"""How much every output unit matters to what a model already does: CoFiTune's fine level (arXiv 2404.10306)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from ....errors import IsolateError
from ....evaluation.randomness import keeping_torch_states, seed_torch
from ....regions.files import read_tensors, write_whole
from ....regions.roles import Role
from .gates import Gates
from .passes import bare, differentiate, over_ranks, undisturbed
from .sites import KINDS, key_of, number, warn_without

FORMAT = "peft_isolate.importance/1"
Method = Literal["absolute", "signed"]
# Seeds further apart than a run has batches.
_SEEDS = 1_000_003


@dataclass(frozen=True, eq=False, repr=False)
class Importance:
    """The importance of output units, 0 to 1: what `measure_importance` returns and the soft mask reads.

    Attributes:
        units: fp32 tensors on the CPU: (n_units,), and (n_experts, n_units) for the block "expert". A key is
            "<stack>.<layer>.<block>.<kind>", such as "model.layers.3.feed-forward.up". Of the kinds
            "up" and "down" the units are output units, of "heads" query heads.
        method: "absolute" or "signed", see `measure_importance`.
        batches: How many it was measured on.
        tokens: How many counted in them.

    Raises:
        IsolateError: Something else is in it.

    Example:
        >>> up = torch.tensor([0.0, 0.5])
        >>> Importance({"model.layers.0.feed-forward.up": up}, "absolute", 1, 8)
        Importance(absolute, 1 layer: 1 up; 1 batch, 8 tokens)
    """

    units: dict[str, torch.Tensor]
    method: Method
    batches: int
    tokens: int

    def __post_init__(self) -> None:
        for key, values in self.units.items():
            parts = key.rsplit(".", 3)
            if len(parts) != 4 or not parts[1].isdigit() or parts[3] not in KINDS:
                raise IsolateError(
                    f"{key!r} is no key of an importance: it is <stack>.<layer>.<block>.<{'|'.join(KINDS)}>"
                )
            if (
                values.dtype != torch.float32
                or values.device.type != "cpu"
                or values.ndim != 1 + (parts[2] == "expert")
                or not values.numel()
            ):
                raise IsolateError(
                    f"{key!r} is {values.dtype} of shape {tuple(values.shape)} on {values.device}: it must be fp32 on "
                    "the CPU, of shape (n_units,), or (n_experts, n_units) for experts"
                )
            if not bool(((values >= 0) & (values <= 1)).all()):  # NaN is neither
                raise IsolateError(f"{key!r} holds values outside 0 to 1: they are no importance")
        counts = all(type(count) is int and count >= 0 for count in (self.batches, self.tokens))
        if not self.units or self.method not in get_args(Method) or not counts:
            raise IsolateError(
                f"{len(self.units)} tensors, method={self.method!r}, batches={self.batches!r}, tokens={self.tokens!r} "
                f"is no importance: that has some tensors, one of the methods {get_args(Method)}, and counts"
            )

    @staticmethod
    def key_of(role: Role) -> str | None:
        """Under which key the importance of a parameter's output units stands.

        Args:
            role: Of up and down the units are the block's own output units, in order; of q, k and v they are query
                heads. A key need not be in `units`.

        Returns:
            None for every other role, in other towers than the language model's, and outside the layers.
        """
        return key_of(role)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one safetensors file, whole or not at all: a tensor a key; all else is JSON in the metadata."""
        about = {"method": self.method, "batches": self.batches, "tokens": self.tokens}
        metadata = {"format": FORMAT, "importance": json.dumps(about)}
        tensors = {key: values.clone() for key, values in self.units.items()}  # safetensors takes no view
        write_whole(path, lambda beside: save_file(tensors, beside, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Importance:
        """Read what `save` wrote.

        Raises:
            FormatError: The file is truncated, altered, or no importance.
        """
        with read_tensors(path, FORMAT, "importance") as (file, metadata):
            about = json.loads(metadata["importance"])
            units = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - it is no mapping
            return cls(units, about["method"], about["batches"], about["tokens"])

    @classmethod
    def combine(cls, several: Sequence[Importance]) -> Importance:
        """The elementwise maximum of importances measured on several data sets, as in the paper.

        Returns:
            Batches and tokens are the sums.

        Raises:
            IsolateError: There are none, or they are of different models or methods: the first difference is named.
        """
        if not several:
            raise IsolateError("no importance to combine: pass at least one")
        first = several[0]
        for i, other in enumerate(several):
            if other.method != first.method:
                raise IsolateError(
                    f"importance 0 is {first.method!r} and importance {i} {other.method!r}: use one method"
                )
            for key in {**first.units, **other.units}:
                left, right = (tuple(one.units[key].shape) if key in one.units else None for one in (first, other))
                if left != right:
                    raise IsolateError(
                        f"{key!r} is of shape {left} in importance 0 and {right} in importance {i} (None: it is not "
                        "there): they are of different models, or heads were measured in one only; measure them alike"
                    )
        units = {key: torch.stack([one.units[key] for one in several]).amax(0) for key in first.units}
        return cls(units, first.method, sum(one.batches for one in several), sum(one.tokens for one in several))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw layers × units, each layer's units sorted, one panel a kind. See `plot_importance`."""
        from .plot import plot_importance

        plot_importance(self, path)

    def __repr__(self) -> str:
        places = [key.rsplit(".", 3) for key in self.units]
        kinds = ", ".join(f"{n} {kind}" for kind in KINDS if (n := sum(place[3] == kind for place in places)))
        n_layers = len({tuple(place[:2]) for place in places})
        return (
            f"Importance({self.method}, {number(n_layers, 'layer')}: {kinds}; "
            f"{number(self.batches, 'batch', 'es')}, {number(self.tokens, 'token')})"
        )


def measure_importance(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    method: Method = "absolute",
    dropout: float = 0.003,
    seed: int = 0,
    max_batches: int | None = None,
    heads: bool = True,
    progress: bool = True,
) -> Importance:
    """Measure how much each output unit matters to what the model does on some data.

    Two passes over a batch, which differ by a little dropout, should say the same; units that decide whether they do
    are important. Every output unit of up and down and every attention head has a virtual gate g = 1, and
    `L = KL(log_softmax(z1) ‖ softmax(z2))`, in fp32, summed over the counting tokens and divided by the rows of the
    batch, is differentiated by g. With G the sum of |∂L/∂g| over the batches, over the number of tokens,
    `I = |tanh((G − mean) / std)|` for each layer and kind; the absolute value is the last step, so that an unusually
    unimportant unit counts as important, too. All weights are frozen, and the model's own dropout is off.

    What no source says, or what differs from the released code (choices): std is that of a sample (n − 1), as torch's
    is; where it is 0, or for a single unit, I = 0; experts are normalised each by itself, and one that saw no token
    has I = 0; dropout acts on what the heads wrote, not on the attention probabilities, which flash and SDPA do not
    show; the gates' gradients never carry over from batch to batch.

    Each batch's dropout depends on `seed` and the number of the batch only, and so does the shuffling of a dataloader
    without a generator of its own. In several processes each measures its own batches, and all return the same: what
    one process gives for all batches, taken in turns. Models in bf16 and fp16 compute in their dtype; gates and KL are
    fp32. The activations of both passes are alive at once, and transformers checkpoints none in eval mode: choose
    small batches.

    Args:
        model: Any transformers model, wrapped or not; it is left as it was, also after an exception: modes,
            `requires_grad`, `grad`, hooks and random state.
        dataloader: Batches are mappings with what the model's forward takes; only tensors are passed on. Padding does
            not count: where `attention_mask` (batch, length) is 0, and on an encoder–decoder where `labels` are −100,
            or without labels where `decoder_attention_mask` is 0. Where a model gives one row of logits a sequence,
            the sequence counts as one. Other models than encoder–decoders do not see `labels`.
        method: "absolute", or "signed" as in the released code: G is the sum of ∂L/∂g, where batches may cancel.
        dropout: Its probability, above 0 and below 1.
        seed: Of the dropout.
        max_batches: Stop after so many; None for all.
        heads: Measure attention heads, too. Where an attention has no place for a gate, one warning says so.
        progress: Show a progress bar.

    Raises:
        IsolateError: No batch, no token that counts, a NaN, or an argument out of range.
        RegionError: Nothing in the model has the role up or down, and no attention is recognised.
    """
    check_arguments(method, dropout, seed, max_batches)
    model = bare(model)
    together = dist.is_available() and dist.is_initialized()
    rank, n_ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    batches, tokens = 0, 0
    length = len(dataloader) if isinstance(dataloader, Sized) else None
    expected = min((n for n in (length, max_batches) if n is not None), default=None)
    shown = tqdm(total=expected, desc="importance", unit="batch", disable=not progress or rank > 0)
    with undisturbed(model), shown:
        gates = Gates(model, heads)
        sums = gates.take()
        seed_torch(model, seed)
        with gates.attached(dropout):
            for batch in islice(dataloader, max_batches):
                # Its own random numbers: neither the dataloader's nor another batch's are touched.
                with keeping_torch_states(model):
                    seed_torch(model, seed * _SEEDS + 1 + batches * n_ranks + rank)
                    tokens += differentiate(model, gates, batch, batches)
                for key, gradient in gates.take().items():
                    if not bool(torch.isfinite(gradient).all()):
                        raise IsolateError(
                            f"batch {batches}: the gradient of {key!r} is NaN or infinite: check the model and this "
                            "batch, and measure fp16 models in bf16"
                        )
                    sums[key] += gradient.abs() if method == "absolute" else gradient
                batches += 1
                shown.update()
    calls = gates.calls()
    if together:
        sums, calls, batches, tokens = over_ranks(model, sums, calls, batches, tokens)
    if not batches:
        raise IsolateError("no batches to measure on: pass at least one (an iterator that was used up gives none)")
    if not tokens:
        raise IsolateError(f"none of the tokens in {batches} batches counts: all of them are masked as padding")
    warn_without({"the model never calls the module": [key for key in sums if not calls[key]]}, stacklevel=3)
    units = {key: normalised(values / tokens) for key, values in sums.items() if calls[key]}
    return Importance(units, method, batches, tokens)


def normalised(gradients: torch.Tensor) -> torch.Tensor:
    """`|tanh((G − mean) / std)|` along the last dimension: fp64 (…, n) -> fp32 (…, n). See `measure_importance`."""
    if gradients.shape[-1] < 2:
        return torch.zeros_like(gradients, dtype=torch.float32)
    std, mean = torch.std_mean(gradients, -1, keepdim=True)
    # Equal numbers have a std of some rounding errors, which must not be blown up to an importance.
    flat = std <= 1e-12 * gradients.abs().amax(-1, keepdim=True)
    scores = ((gradients - mean) / std.masked_fill(flat, 1.0)).masked_fill(flat, 0.0)
    return scores.tanh().abs().float()


def check_arguments(method: Any, dropout: Any, seed: Any, max_batches: Any) -> None:
    """Raise `IsolateError` where `measure_importance` would, of its arguments alone."""
    if method not in get_args(Method):
        raise IsolateError(f"method={method!r}: use one of {get_args(Method)}")
    if not isinstance(dropout, int | float) or not 0.0 < dropout < 1.0:
        raise IsolateError(
            f"dropout={dropout!r}: the two passes differ by it alone; use a probability above 0 and below 1: 0.003"
        )
    if type(seed) is not int or not 0 <= seed < 2**40:
        raise IsolateError(f"seed={seed!r}: use a whole number from 0 to 2**40")
    if max_batches is not None and (type(max_batches) is not int or max_batches < 1):
        raise IsolateError(f"max_batches={max_batches!r}: use a whole number from 1 on, or None for all of them")
