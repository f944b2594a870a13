"""The side path: `base_layer(x) + delta(x)`, where W0 is not a plain local tensor that could be composed.

A quantised weight has no arithmetic, one that ZeRO-3 shards or accelerate offloads is not there outside the base
layer's own forward. So the base layer runs as it is, and what the deltas contribute is computed beside it and added.

It rounds differently: each summand is rounded to the dtype of the activations, and then their sum, where the compose
path rounds the weight once. With u the unit roundoff of that dtype (2⁻⁸ for bf16, 2⁻²⁴ for fp32) and n the input
features, one output differs from the exact sum by at most `u · (n + 3) · (|W0| + |Δ|) @ |x|`; in practice by a few u.
Nothing can be merged on this path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..regions.region import logical_shape
from .compose import Terms, compose, linear

if TYPE_CHECKING:
    from .layer import DeltaLayer

# What accelerate hangs on a module to load its weights around a forward.
HOOKED = ("forward", "_hf_hook", "_old_forward")


def can_stand_beside(module: nn.Module) -> bool:
    """Whether the module's output is affine in its parameters, so that a delta's part of it can be added."""
    if is_linear(module) or isinstance(module, nn.Embedding):
        return True
    return not module._modules and "norm" in type(module).__name__.lower()


def is_linear(module: nn.Module) -> bool:
    """Whether it computes x @ W.T + b (or x @ W + b, for a `Conv1D`), also from a quantised W."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def add_beside(layer: DeltaLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The base layer's output, plus α times what each active adapter's deltas contribute to it.

    Args:
        layer: Wraps a module for which `can_stand_beside`.
        args, kwargs: Of its forward; the first is x, (..., in_features), or token ids for an embedding.

    Returns:
        The output in the dtype the base layer gives it.
    """
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
    return type(module).forward(bare, *args, **kwargs)
