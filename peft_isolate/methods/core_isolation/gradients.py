"""The other score of CPI-FT's cores: how large the gradient at the base is, without a probe (the control of §3)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ...checkpoints.shards import TensorFile
from ...checkpoints.weights import tuner_layers, weights_of
from ...deltas.delta import all_finite
from ...errors import IsolateError
from ...evaluation.forgetting import predictions
from ...evaluation.scorers import undisturbed
from ...regions.files import read_tensors, write_whole
from ...regions.region import walk_parameters
from .scope import scope

FORMAT = "peft_isolate.gradients/1"


def measure_gradients(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], *, include_embeddings: bool = False
) -> dict[str, torch.Tensor]:
    """The mean over batches of |∇ loss|, for every scalar in scope.

    The loss of a batch is the mean cross-entropy of its tokens, as `token_loss` counts them, without dropout. On the
    model's devices there is one parameter's gradient at a time beside what autograd keeps. The model is left as it
    was: numbers, gradients, what requires one, modes, random states.

    Args:
        model: The base, θ0: a causal language model.
        batches: Mappings of `input_ids` (batch, length) and what else `token_loss` takes.
        include_embeddings: See `scope`.

    Returns:
        {parameter: fp32 tensor of its shape on the CPU}, zero where no gradient arrives. (float64 of float64 models.)

    Raises:
        IsolateError: Adapters are in the model; a weight is quantised or not here; there is no batch, or none of its
            tokens counts; a gradient is NaN or infinite.
    """
    if isinstance(batches, Mapping):
        raise IsolateError("batches is one mapping, where several are measured on: pass a list of it, [batch]")
    if tuner_layers(model):
        raise IsolateError("adapters are in the model, and the gradient is one at the base: pass the base model")
    weights = weights_of(model)
    inside = scope(model, include_embeddings)
    for name in inside:
        weights.check_plain(name)
    with torch.inference_mode(False), torch.enable_grad():
        dtypes = {name: weights.delta_dtype(name) for name in inside}
        sums = {name: torch.zeros(weights.shapes[name], dtype=dtypes[name], device="cpu") for name in inside}
        return _measure(model, batches, sums)


def _measure(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], sums: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    count = 0
    with undisturbed(model), _collecting(model, sums):
        for count, batch in enumerate(batches, start=1):
            if not isinstance(batch, Mapping):
                raise IsolateError(
                    f"batch {count - 1} is a {type(batch).__name__}, no mapping: pass {{'input_ids': …}} for each"
                )
            # What a caller made in inference mode can take no part in a backward.
            batch = {key: each.clone() if isinstance(each, torch.Tensor) else each for key, each in batch.items()}
            logits, targets = predictions(model, batch, count - 1)
            if not len(targets):
                raise IsolateError(f"no token of batch {count - 1} counts: a row needs two tokens that are no padding")
            F.cross_entropy(logits.float(), targets.to(logits.device)).backward()
    if not count:
        raise IsolateError("no batches to measure on: pass at least one (an iterator that was used up gives none)")
    for name, total in sums.items():
        if not all_finite(total):
            raise IsolateError(not_finite(name))
        total.div_(count)
    return sums


def not_finite(name: str) -> str:
    """What to say where a gradient has such a number."""
    return f"the gradient of {name!r} is NaN or infinite: check the model and the batches; fp16 models: try bf16"


def save_gradients(path: str | os.PathLike[str], gradients: Mapping[str, torch.Tensor]) -> None:
    """Write what `measure_gradients` returned to one file, whole or not at all. Missing folders are made."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in gradients.items()}
    write_whole(path, lambda beside: save_file(tensors, beside, metadata={"format": FORMAT}))


class SavedGradients(Mapping[str, torch.Tensor]):
    """What `save_gradients` wrote; each tensor is read when it is asked for.

    Raises:
        IsolateError: There is no such file.
        FormatError: It is another file, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with read_tensors(path, FORMAT, "file of gradients"):
            self._file = TensorFile(Path(path))

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._file.entries:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.entries)

    def __len__(self) -> int:
        return len(self._file.entries)


@contextmanager
def _collecting(model: nn.Module, sums: dict[str, torch.Tensor]) -> Iterator[None]:
    """Every backward adds |gradient| to the sums; gradients, and what requires one, are as before afterwards."""
    inside = {name: parameter for name, _, _, parameter in walk_parameters(model) if name in sums}
    learning = {parameter: parameter.requires_grad for parameter in model.parameters()}
    gradients = {parameter: parameter.grad for parameter in inside.values()}

    def collect(name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        sums[name].add_(parameter.grad.detach().abs().to("cpu", sums[name].dtype))
        parameter.grad = None

    hooks = []
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        for name, parameter in inside.items():
            parameter.grad = None
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: collect(name, p)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, requires_grad in learning.items():
            parameter.requires_grad_(requires_grad)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
