"""The side path: `base_layer(x) + delta(x)`, where W0 is not a plain local tensor that could be composed.

A quantised weight has no arithmetic, one that ZeRO-3 shards or accelerate offloads is not there outside the base
layer's own forward. So the base layer runs as it is, and what the deltas contribute is computed beside it and added.

It rounds differently: Δ, each summand and each sum are rounded to the dtype of the activations, where the compose path
rounds the weight and the product. Let u be that dtype's unit roundoff (2⁻²⁴ for fp32, 2⁻¹¹ for fp16, 2⁻⁸ for bf16), n
the input features, and let products accumulate in fp32. Then an output of a linear layer whose W0 is plain differs
from the exact sum, up to terms in u², by at most

    (3·u + n·2⁻²⁴) · ((|W0| + |Δ|) @ |x| + |b|)

and by u more for each further summand (a bias's delta, another adapter), and for an α other than 0 and 1. In fp16 each
delta adds max(1, |α|) · 2⁻²⁵ · (Σ|x| + 3): below 2⁻¹⁴ it has no more than fp16's smallest steps. What a GPU does with
TF32 or with reductions in reduced precision comes on top, as on any path. Around a quantised W0 this is the distance
from the base layer's own output, which has an error of its own. Nothing can be merged on this path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import IsolateError
from ..regions.region import PLAIN_DTYPES, logical_shape
from .compose import compose
from .linear import linear
from .terms import Terms

if TYPE_CHECKING:
    from .layer import DeltaLayer

# What accelerate hangs on a module to load its weights around a forward.
HOOKED = ("forward", "_hf_hook", "_old_forward")

LINEAR = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def can_stand_beside(module: nn.Module) -> bool:
    """Whether the module's output is known to be affine in its parameters, so that a delta's part can be added.

    So are linear layers (quantised ones, too), convolutions, embeddings and norms. A subclass with a forward of its
    own may do anything (normalise its weight, route tokens), and a packed weight that is not a linear layer's is
    read by its module in a way of its own.
    """
    if is_linear(module):
        return True
    if module._modules or not all(p.dtype in PLAIN_DTYPES for p in module._parameters.values() if p is not None):
        return False
    if isinstance(module, nn.Embedding):
        return module.max_norm is None
    if isinstance(module, CONVOLUTIONS):
        return _has_forward_of(module, CONVOLUTIONS)
    vectors = all(len(logical_shape(module, name, p)) < 2 for name, p in module._parameters.items() if p is not None)
    return vectors and "norm" in type(module).__name__.lower()


def is_linear(module: nn.Module) -> bool:
    """Whether it computes x @ W.T + b (or x @ W + b, for a `Conv1D`), also from a quantised W."""
    if _has_forward_of(module, LINEAR):
        return True
    # A packed weight goes with its quantiser's own forward; a tensor subclass (torchao's) with that of nn.Linear.
    weight = module._parameters.get("weight")
    packed = weight is not None and weight.dtype not in PLAIN_DTYPES
    return packed and all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _has_forward_of(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(module, known) and type(module).forward is known.forward for known in classes)


def add_beside(layer: DeltaLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The base layer's output, plus α times what each active adapter's deltas contribute to it.

    Args:
        layer: Wraps a module for which `can_stand_beside`.
        args, kwargs: Of its forward; the first is x, (..., in_features), or token ids for an embedding.

    Returns:
        The output in the dtype the base layer gives it.

    Raises:
        IsolateError: Deltas that accelerate offloads are to be trained: what it brings for a forward are copies, and
            their gradients would be lost.
    """
    learns = layer.training and torch.is_grad_enabled()
    if learns and any(numbers.is_meta and numbers.requires_grad for numbers in layer.parameters()):
        raise IsolateError(
            "the deltas are offloaded (or on the meta device), where they cannot be trained: offload the base model "
            "first and wrap it then, so that they stay where the model computes"
        )
    result = layer.base_layer(*args, **kwargs)
    for adapter, scale in layer.scaling.items():
        if adapter in layer.active_adapters and scale != 0.0:
            for part in _contributions(layer, adapter, result, args, kwargs):
                result = result + (part if scale == 1.0 else part * scale).to(result.dtype)
    return result


def _contributions(layer: DeltaLayer, adapter: str, result: torch.Tensor, args: Any, kwargs: Any):
    """What the deltas of one adapter add to the output, before α."""
    base = layer.get_base_layer()
    deltas = {name: layer.deltas(name)[adapter] for name in layer.parameter_names if adapter in layer.deltas(name)}
    if is_linear(base):
        x = args[0] if args else next(iter(kwargs.values()))
        if "weight" in deltas:
            transposed = isinstance(base, Conv1D)
            yield deltas["weight"](lambda terms: _linear(x, terms, deltas["weight"].shape, transposed))
        if "bias" in deltas:
            yield deltas["bias"](lambda terms: compose(result.new_zeros(deltas["bias"].shape), terms))
        return
    # f(θ0 + Δ) = f(θ0) + f(Δ) − f(0) for whatever is affine in its parameters, such as norms (Gemma's adds 1).
    zeros = {
        name: result.new_zeros(logical_shape(base, name, parameter))
        for name, parameter in base._parameters.items()
        if parameter is not None
    }
    if deltas:
        composed = {
            name: delta(lambda terms, name=name: compose(zeros[name], terms)) for name, delta in deltas.items()
        }
        yield _run(base, zeros | composed, args, kwargs) - _run(base, zeros, args, kwargs)


def _linear(x: torch.Tensor, terms: Terms, shape: tuple[int, ...], transposed: bool) -> torch.Tensor:
    return linear(x, x.new_zeros(()).expand(shape), None, terms, transposed=transposed)


def _run(module: nn.Module, parameters: dict[str, torch.Tensor], args: Any, kwargs: Any) -> torch.Tensor:
    """The module's own computation with other parameters, without the hooks around it that would load its own."""
    bare = object.__new__(type(module))
    bare.__dict__.update({name: value for name, value in module.__dict__.items() if name not in HOOKED})
    bare.__dict__["_parameters"] = {name: parameters.get(name) for name in module._parameters}
    # Running averages are the base layer's own affair.
    bare.__dict__["_buffers"] = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    return type(module).forward(bare, *args, **kwargs)
