"""Put a model at other settings of one adapter for a while: with numbers of it reset or pruned, and at any α."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..deltas.adapters import parameter_deltas
from ..deltas.delta import Delta
from ..deltas.scale import as_alpha, layers_to_scale, scale_of
from ..errors import IsolateError
from ..regions.fingerprint import as_bytes
from .scorers import SPECIALITY, VERSATILITY, checked_scores, name_of, undisturbed

Change = Callable[..., Any]
Score = Callable[[Any], Mapping[str, Any]]


class Dial:
    """One adapter of a model, and what may be done to it.

    Args:
        model: Has the adapter, active and not merged.
        changes: Functions of (model, value) that write numbers of the adapter in place. One that takes `adapter_name`
            is given it.
        adapter_name: The adapter.

    Raises:
        IsolateError: There is no such adapter of this library, it is merged or has no effect, its numbers are not
            here, or two changes have one name.
    """

    def __init__(self, model: nn.Module, changes: Sequence[Change], adapter_name: str) -> None:
        self.model, self.adapter_name = model, adapter_name
        self.changes = named(changes)
        layers = layers_to_scale(model, 1.0, adapter_name)
        if all(layer.disable_adapters or adapter_name not in layer.active_adapters for layer in layers):
            raise IsolateError(
                f"the adapter {adapter_name!r} is not active, so no α of it changes the model: "
                f"model.set_adapter({adapter_name!r}), or enable_adapter_layers(), first"
            )
        if any(layer.merged for layer in layers):
            raise IsolateError("another adapter is merged, and hides this one: unmerge_adapter() first")
        for delta in self._deltas().values():
            delta.check_here()

    def _deltas(self) -> dict[str, Delta]:
        return parameter_deltas(self.model, self.adapter_name)

    def _every_tensor(self) -> list[torch.Tensor]:
        return [tensor for delta in self._deltas().values() for tensor in _tensors(delta).values()]

    def digest(self) -> str:
        """Of the adapter's region and numbers, in hex: whatever it is called, and however it was made or loaded."""
        hashed = hashlib.sha256()
        for name, delta in sorted(self._deltas().items()):
            for key, tensor in sorted(_tensors(delta).items()):
                counted = delta.zero_holes(key, tensor.detach()) if key in delta.places else tensor
                hashed.update(f"{name} {key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                hashed.update(as_bytes(counted))
        return hashed.hexdigest()

    def check(self, alpha: float) -> None:
        """Raise `IsolateError` where the adapter cannot be set to this α."""
        layers_to_scale(self.model, alpha, self.adapter_name)

    def set(self, alpha: float) -> None:
        """Set α."""
        for layer in layers_to_scale(self.model, alpha, self.adapter_name):
            layer.set_scale(self.adapter_name, alpha)

    @contextmanager
    def kept(self, *, numbers: bool, on_error_only: bool = False) -> Iterator[None]:
        """Afterwards every number of the adapter and every α is as before, bit for bit, whatever was raised.

        Args:
            numbers: They may be changed in here, so a copy of them is kept.
            on_error_only: Only then.
        """
        scales = scale_of(self.model, self.adapter_name)
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        if numbers:
            copies = [(tensor, tensor.detach().clone()) for tensor in self._every_tensor()]
        done = False
        try:
            yield
            done = True
        finally:
            if not (done and on_error_only):
                with torch.no_grad():
                    for tensor, before in copies:
                        if not _same(tensor, before):
                            tensor.copy_(before)
                for layer, alpha in scales.items():
                    layer.scaling[self.adapter_name] = alpha

    def apply(self, values: Mapping[str, Any]) -> None:
        """Apply the changes whose value is not None, in order.

        Raises:
            IsolateError: A change is unknown here, or put other tensors in the place of the adapter's, which nobody
                could take back.
        """
        if missing := [name for name, value in values.items() if value is not None and name not in self.changes]:
            raise IsolateError(
                f"the point has {missing[0]}={values[missing[0]]!r}, and the frontier does not know that function: "
                f"load it with Frontier.load(path, changes=[{missing[0]}])"
            )
        before = self._every_tensor()
        for name, value in values.items():
            if value is None:
                continue
            change = self.changes[name]
            change(self.model, value, **({"adapter_name": self.adapter_name} if _takes_name(change) else {}))
            after = self._every_tensor()
            if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
                raise IsolateError(
                    f"{name} gave the adapter {self.adapter_name!r} other tensors, which cannot be taken back: load "
                    "it again, and pass changes that write in place, as half_reset and prune do"
                )

    def scores(self, score: Score, where: str) -> tuple[float, float]:
        """(speciality, versatility) as the model is, undisturbed.

        Raises:
            IsolateError: One of them is missing or no finite number; `where` names the point.
        """
        with undisturbed(self.model):
            found = score(self.model)
        numbers = checked_scores(found, where)
        return numbers[SPECIALITY], numbers[VERSATILITY]


def named(changes: Iterable[Change]) -> dict[str, Change]:
    """{name: change}. A partial function goes by the name of what it was made of. Raises `IsolateError`."""
    found: dict[str, Change] = {}
    if not isinstance(changes, Iterable):
        raise IsolateError(f"changes={changes!r}: give a list of functions, such as [half_reset, prune]")
    for change in changes:
        if not callable(change):
            raise IsolateError(f"{change!r} is no change: pass functions of (model, value), such as half_reset, prune")
        inner = change
        while isinstance(inner, functools.partial):
            inner = inner.func
        name = name_of(inner)
        if name in found:
            raise IsolateError(f"two changes are called {name!r}: wrap one in a function of another name")
        found[name] = change
    return found


def _takes_name(change: Change) -> bool:
    """Whether a change has to be told which adapter it is to write to."""
    try:
        return "adapter_name" in inspect.signature(change).parameters
    except (TypeError, ValueError):  # of what is written in C nobody knows
        return False


def _tensors(delta: Delta) -> dict[str, torch.Tensor]:
    """{name: what an adapter has of a parameter}: numbers, codes, importance."""
    return dict(delta.named_parameters(recurse=False)) | delta.state


def _same(tensor: torch.Tensor, before: torch.Tensor) -> bool:
    """Bit for bit. Writing what is there already would have positions decoded again."""
    left, right = (each.detach().contiguous().view(-1).view(torch.uint8) for each in (tensor, before))
    return torch.equal(left, right)


def as_alphas(alphas: Any) -> tuple[float, ...]:
    """Finite numbers, each once; others raise `IsolateError`."""
    found = tuple(map(as_alpha, alphas if isinstance(alphas, Iterable) else [alphas]))
    if not found or len(set(found)) < len(found):
        raise IsolateError(f"alphas={found!r}: give at least one, and each once")
    return found
