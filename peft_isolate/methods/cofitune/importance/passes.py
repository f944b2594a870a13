"""Two stochastic passes over a batch, how they differ, and how a model is left as it was."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ....errors import IsolateError
from ....evaluation.forgetting import IGNORED, device_of_model, evaluating
from ....evaluation.randomness import keeping_torch_states
from ....regions.region import unwrap
from .gates import Gates
from .sites import wide

# Positions whose logits are cast to fp32 at once: with a vocabulary of 128k that is half a gigabyte a pass.
_POSITIONS = 1024


def differentiate(model: nn.Module, gates: Gates, batch: Any, number: int) -> int:
    """Two passes over a batch, and the gradient of their divergence to the gates, which hold it then.

    Args:
        model: In eval mode, frozen, with the gates attached.
        gates: Its gates.
        batch: A mapping of what the forward takes.
        number: Of the batch, for messages.

    Returns:
        Tokens that count.

    Raises:
        IsolateError: The batch or the logits are of the wrong kind, or not finite.
    """
    inputs, targets = _inputs(model, batch, number)
    first, second = (_logits(model(**inputs), number) for _ in range(2))
    counted = _counting(inputs | targets, first, _is_encoder_decoder(model), number)
    loss, *gradients = _divergence(first, second, counted)
    if not math.isfinite(loss):
        raise IsolateError(
            f"batch {number}: the divergence of the two passes is {loss}: the logits are NaN or infinite, "
            f"{_first_not_finite(model, gates, inputs)}; check the model and the batch; fp16 models: try bf16"
        )
    if not first.requires_grad:
        raise IsolateError(
            f"{type(unwrap(model)).__name__} calls none of the modules with an importance, or cuts the gradient off "
            "(a forward under torch.no_grad): it cannot be measured"
        )
    # The largest entry is brought to 1 in fp16, in whose range the gradients of a large vocabulary vanish.
    largest = max(float(gradient.abs().max()) for gradient in gradients) if first.dtype == torch.float16 else 0.0
    scale = 1.0 / largest if largest else 1.0
    torch.autograd.backward([first, second], [(part * scale).to(first.dtype) for part in gradients])
    gates.scale(1.0 / (scale * len(first)))
    return int(counted.sum())


def _divergence(
    first: torch.Tensor, second: torch.Tensor, counted: torch.Tensor
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """KL(log_softmax(first) ‖ softmax(second)) as torch's `kl_div(input, target)` takes it, summed over the tokens.

    Args:
        first, second: Logits (…, vocabulary) in any float dtype; computed in fp32, some positions at a time.
        counted: bool (…,), the tokens to sum over.

    Returns:
        It, and its gradients to both, of their shape and in fp32; 0 at the other tokens.
    """
    rows = [logits.detach().flatten(0, -2) for logits in (first, second)]
    gradients = [torch.zeros_like(part, dtype=wide(part.dtype)) for part in rows]
    total = 0.0
    for chunk in counted.flatten().nonzero()[:, 0].split(_POSITIONS):
        logits = [part[chunk].to(wide(part.dtype)).requires_grad_() for part in rows]
        log_p, log_q = (part.log_softmax(-1) for part in logits)
        # With the logarithm for target: a probability that fp32 rounds to 0 has a gradient of NaN otherwise.
        loss = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
        for gradient, part in zip(gradients, torch.autograd.grad(loss, logits), strict=True):
            gradient[chunk] = part
        total += loss.item()
    return total, gradients[0].reshape(first.shape), gradients[1].reshape(second.shape)


def _inputs(model: nn.Module, batch: Any, number: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(what the forward gets, labels that it does not get)."""
    if not isinstance(batch, Mapping):
        raise IsolateError(
            f"batch {number} is a {type(batch).__name__}: give mappings like {{'input_ids': …, 'attention_mask': …}}, "
            "as transformers' collators make them"
        )
    device = device_of_model(model)
    inputs: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            # What a caller made in inference mode can take no part in a backward.
            inputs[name] = (value.clone() if value.is_inference() else value.detach()).to(device)
    if not inputs:
        raise IsolateError(f"batch {number} has no tensor but {sorted(batch)}: tokenize the text, return_tensors='pt'")
    # An encoder–decoder makes its decoder's inputs from them; elsewhere they would only cost a loss.
    targets = {} if _is_encoder_decoder(model) else {n: inputs.pop(n) for n in ("labels",) if n in inputs}
    if "use_cache" in inspect.signature(unwrap(model).forward).parameters:
        inputs["use_cache"] = False
    return inputs, targets


def _logits(output: Any, number: int) -> torch.Tensor:
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 3):
        raise IsolateError(
            f"batch {number}: the model returned a {type(output).__name__} without logits of shape (batch, length, "
            "vocabulary) or (batch, classes): pass a model with a head, such as AutoModelForCausalLM's"
        )
    return logits


def _counting(
    inputs: Mapping[str, torch.Tensor], logits: torch.Tensor, encoder_decoder: bool, number: int
) -> torch.Tensor:
    """Which rows of the logits count: bool (batch, length), or (batch,) where there is one row a sequence."""
    everything = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if logits.ndim == 2:
        return everything
    names = ("labels", "decoder_attention_mask") if encoder_decoder else ("attention_mask",)
    name = next((name for name in names if name in inputs), None)
    if name is None:
        return everything
    mask = inputs[name].to(logits.device)
    if mask.shape != everything.shape:
        raise IsolateError(
            f"batch {number}: {name} of shape {tuple(mask.shape)} beside logits of shape {tuple(logits.shape)}: it "
            "must be (batch, length), 1 for real tokens, and the model must give one row of logits a token"
        )
    return mask != IGNORED if name == "labels" else mask.bool()


def _first_not_finite(model: nn.Module, gates: Gates, inputs: Mapping[str, Any]) -> str:
    """A third pass, to say where it begins."""
    gates.watched = []
    try:
        with torch.no_grad():
            model(**inputs)
        return f"first so at {gates.watched[0]!r}" if gates.watched else "and all gated units are finite"
    finally:
        gates.watched = None


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Everything frozen, in eval mode and with autograd on; afterwards as it was: these, and the random state."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with keeping_torch_states(model), evaluating(model), torch.inference_mode(False), torch.enable_grad():
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)


def bare(model: nn.Module) -> nn.Module:
    """Without DDP, which waits for gradients that no frozen parameter has, and without `torch.compile`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def over_ranks(
    model: nn.Module, sums: dict[str, torch.Tensor], calls: dict[str, int], batches: int, tokens: int
) -> tuple[dict[str, torch.Tensor], dict[str, int], int, int]:
    """The sums over all processes, in one message."""
    counts = torch.tensor([batches, tokens, *(calls[key] for key in sums)], dtype=torch.float64)
    # NCCL takes no tensor of the CPU, and gloo some of other devices only.
    device = device_of_model(model) if dist.get_backend() != "gloo" else torch.device("cpu")
    flat = torch.cat([counts, *(values.flatten() for values in sums.values())]).to(device)
    dist.all_reduce(flat)
    counts, *parts = flat.cpu().split([len(counts), *(values.numel() for values in sums.values())])
    batches, tokens, *called = (round(count) for count in counts.tolist())
    summed = {key: part.reshape(sums[key].shape) for key, part in zip(sums, parts, strict=True)}
    return summed, dict(zip(sums, called, strict=True)), batches, tokens
