"""Virtual gates on the output units of a model: one number a unit, always 1, of which only the gradient is wanted.

They are put on by hooks, so any architecture whose roles are known has them, and its attention may be flash, SDPA or
eager. A gate changes no bit of the forward; what it would change if it were not 1 is what its gradient says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from ....errors import IsolateError
from ....regions.region import base_module, unwrap
from .sites import Reduce, Site, find_sites


class _Gate(torch.autograd.Function):
    """x times the gates on it. They are 1, so the forward is x; the backward gives their gradient in their dtype.

    Nothing is kept for the backward but x, which is no copy, and the products are never rounded to x's dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor, reduce: Reduce) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.reduce = reduce
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return gradient if ctx.needs_input_grad[0] else None, ctx.reduce(gradient, x), None


def drop(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Dropout, whatever mode the model is in."""
    return F.dropout(x, probability, training=True)


class Gates:
    """All gates of a model.

    Args:
        model: Any model; where an adapter wraps a module, what the wrapper gives is gated.
        heads: Gate attention heads, too.

    Raises:
        RegionError, IsolateError: See `find_sites`.
    """

    def __init__(self, model: nn.Module, heads: bool) -> None:
        self._model = model
        self.sites = find_sites(model, heads)
        # While this is a list, the keys whose activations are not finite are appended to it, in the model's order.
        self.watched: list[str] | None = None

    @contextmanager
    def attached(self, dropout: float) -> Iterator[None]:
        """Put the gates on, and dropout of this probability after every feed-forward and on what the heads wrote."""
        with ExitStack() as stack:
            for site in self.sites:
                module = _at(self._model, site.module)
                if site.is_fused:
                    # The inner one: a wrapper calls it with the composed weights in place.
                    module = base_module(module)
                    stack.callback(_uncover, site, module)
                    handles = [
                        module.register_forward_pre_hook(partial(self._cover, site)),
                        module.register_forward_hook(partial(self._after_experts, site, dropout), always_call=True),
                    ]
                elif site.kind == "heads":
                    handles = [module.register_forward_pre_hook(partial(self._before_o, site, dropout))]
                else:
                    handles = [module.register_forward_hook(partial(self._after, site, dropout))]
                for handle in handles:
                    stack.callback(handle.remove)
            yield

    def take(self) -> dict[str, torch.Tensor]:
        """{key: gradient since the last call}, fp64 on the CPU, (n_units,) or (n_experts, n_units); it is zeroed."""
        found: dict[str, list[torch.Tensor]] = {}
        for site in self.sites:
            gradient, site.gate.grad = site.gate.grad, None
            gradient = torch.zeros_like(site.gate, requires_grad=False) if gradient is None else gradient
            found.setdefault(site.key, []).append(gradient.cpu().double())
        listed = {site.key for site in self.sites if site.expert is not None}
        return {key: torch.stack(parts) if key in listed else parts[0] for key, parts in found.items()}

    def scale(self, factor: float) -> None:
        """Multiply the gradients that the gates hold."""
        for site in self.sites:
            if site.gate.grad is not None:
                site.gate.grad *= factor

    def calls(self) -> dict[str, int]:
        """{key: how often its modules were called}; 0 where a model reads the weights and calls no module."""
        calls: dict[str, int] = {}
        for site in self.sites:
            calls[site.key] = calls.get(site.key, 0) + site.calls
        return calls

    def _through(self, site: Site, x: torch.Tensor, parameter: str = "") -> torch.Tensor:
        if self.watched is not None and not bool(torch.isfinite(x).all()):
            self.watched.append(site.key)
        return _Gate.apply(x, site.gate, site.reduce[parameter])

    def _after(self, site: Site, dropout: float, _module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            return output
        site.calls += 1
        gated = self._through(site, output)
        return drop(gated, dropout) if site.kind == "down" else gated

    def _before_o(self, site: Site, dropout: float, _module: nn.Module, args: Any) -> Any:
        if not args or not isinstance(args[0], torch.Tensor):
            return args
        site.calls += 1
        return (drop(self._through(site, args[0]), dropout), *args[1:])

    def _cover(self, site: Site, module: nn.Module, _args: Any) -> None:
        """Let the experts' forward read gated weights: scaling a row of W and of its bias scales that output unit.

        An attribute of the instance is found before the parameter of that name, which stays where it is.
        """
        for name in site.reduce:
            if parametrize.is_parametrized(module, name):
                raise IsolateError(
                    f"{site.module}.{name} is computed by a parametrization (PEFT's target_parameters), which cannot "
                    "be gated: measure the importance on the base model, or merge the adapter first"
                )
            module.__dict__[name] = self._through(site, getattr(module, name), name)
        site.calls += 1

    def _after_experts(self, site: Site, dropout: float, module: nn.Module, _args: Any, output: Any) -> Any:
        _uncover(site, module)
        # After an exception in the forward there is no output.
        return drop(output, dropout) if site.kind == "down" and isinstance(output, torch.Tensor) else output


def _uncover(site: Site, module: nn.Module) -> None:
    for name in site.reduce:
        module.__dict__.pop(name, None)


def _at(model: nn.Module, name: str) -> nn.Module:
    """The module of this name, with what wraps it."""
    module = unwrap(model)
    for leaf in name.split("."):
        if leaf not in module._modules:
            module = base_module(module)
        module = module.get_submodule(leaf)
    return module
