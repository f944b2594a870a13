"""Any model as its tensors, by the names they have in memory: a live one, a state dict, a folder, a Hub id."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..deltas.targets import tied_names
from ..errors import IsolateError, RegionError
from ..regions.region import is_plain, logical_shape, shapes_of, unwrap, walk_parameters
from .memory import Checkpoint

Source = nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str]

# What the modules of embeddings are called whose names do not hold "embed".
EMBEDDING_NAMES = ("wte", "wpe", "shared")
# What batch norms count, which a state dict holds beside parameters.
COUNTED = ("running_mean", "running_var", "num_batches_tracked")


class Weights(Mapping[str, torch.Tensor]):
    """A model's weights, `{parameter: its numbers}`, tied ones once; each is read when it is asked for, none is kept.

    What is read may be the model's own memory, or mapped from a file: do not write to it.

    Attributes:
        name: For messages, and what an adapter over these weights says its base is.
        model: A module of these names, shapes, roles and ties; on the meta device for a folder, and without forwards
            for a state dict.
        shapes: {parameter: shape}.
        folder: Where it lies; None of what is in memory.
        revision: As it was given.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], torch.Tensor],
        check: Callable[[str], None],
        checkpoint: Checkpoint | None = None,
        revision: str | None = None,
    ) -> None:
        self.name, self.model, self.shapes = name, model, dict(shapes)
        self._read, self._check = read, check
        self.checkpoint, self.revision = checkpoint, revision

    @property
    def folder(self) -> Path | None:
        """Where it lies; None of what is in memory."""
        return None if self.checkpoint is None else self.checkpoint.folder

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name)

    def read(self, name: str) -> torch.Tensor:
        """A parameter's numbers, as they are in memory, on their device.

        Raises:
            RegionError: There is no such parameter.
            IsolateError: Its numbers are not here, or are quantised.
        """
        self._known(name)
        self._check(name)
        return self._read(name).detach()

    def check_plain(self, name: str) -> None:
        """Raise as `read` does."""
        self._known(name)
        self._check(name)

    def delta_dtype(self, name: str) -> torch.dtype:
        """The dtype that a delta on a parameter has: fp32, or float64 where its numbers are."""
        self._known(name)
        if self.checkpoint is None:
            return torch.promote_types(self._read(name).dtype, torch.float32)
        stored = {self.checkpoint.shards[disk].dtype for disk in self.checkpoint.group_of(name).disk}
        return torch.float64 if "F64" in stored else torch.float32

    def _known(self, name: str) -> None:
        if name not in self.shapes:
            raise RegionError(f"{self.name!r} has no parameter {name!r}: the name is another model's")


def weights_of(source: Source | Weights, revision: str | None = None, *, like: Weights | None = None) -> Weights:
    """The weights of a model.

    Args:
        source: A module: its *base* weights, adapters that wrap it are looked through. A folder or Hub id in
            safetensors files, in whatever names transformers stores it. `Weights` are passed through. A state dict by
            the names in memory: what is no floating-point tensor is left out, and so is what batch norms count.
            Without `like` embeddings are known by their modules' names, and a state dict cannot tell other towers of a
            model, other buffers, or ties whose tensors do not share their memory: all are parameters of the language
            model then, each by itself.
        revision: Of the Hub.
        like: Weights of the same architecture: they tell the class to read a folder as, and what is tied in a state
            dict.

    Raises:
        IsolateError: Adapters are merged into the module; there is no model; see `Checkpoint`.
        RegionError: A state dict has two different tensors where `like` ties them.
        FormatError: A file is damaged.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module):
        return _of_module(source)
    if isinstance(source, Mapping):
        return _of_state(source, like)
    if not isinstance(source, str | os.PathLike):
        raise IsolateError(f"{type(source).__name__} is no model: pass a module, a state dict, a folder or a Hub id")
    kind = None if like is None or not hasattr(like.model, "config") else type(unwrap(like.model)).__name__
    return of_checkpoint(Checkpoint(source, kind, revision), revision)


def of_checkpoint(checkpoint: Checkpoint, revision: str | None = None) -> Weights:
    """The weights that a checkpoint has."""
    shapes = {name: tuple(checkpoint.parameters[name].shape) for name in checkpoint}
    return Weights(
        checkpoint.name, checkpoint.model, shapes, checkpoint.read, checkpoint.check_plain, checkpoint, revision
    )


def check_names(base: Weights, tuned: Weights, remedy: str) -> None:
    """Refuse tensors that only one of the two has, or that differ in shape.

    Args:
        base: W0.
        tuned: The other one.
        remedy: Ends the message.

    Raises:
        RegionError: Names the first such tensor, with its shapes.
    """
    for name in dict.fromkeys([*_shapes(base), *_shapes(tuned)]):
        left, right = _shapes(base).get(name), _shapes(tuned).get(name)
        if left is not None and right is not None and left != right:
            raise RegionError(f"{name!r} is {left} in the base and {right} in the tuned checkpoint: {remedy}")
        if (name in base) != (name in tuned):
            where = ("base", "tuned checkpoint")[name in tuned]
            raise RegionError(f"{name!r} of shape {right if left is None else left} is only in the {where}: {remedy}")
    if base.checkpoint is not None and tuned.checkpoint is not None:
        known = set(base.checkpoint.shards)
        if new := [name for name in tuned.checkpoint.unused if name not in known]:
            shape = tuned.checkpoint.shards[new[0]].shape
            raise RegionError(f"{new[0]!r} of shape {shape} is only in the tuned checkpoint: {remedy}")


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Of all parameters of the architecture, also of those that the files lack."""
    if weights.checkpoint is None:
        return weights.shapes
    return {name: tuple(parameter.shape) for name, parameter in weights.checkpoint.parameters.items()}


def tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """PEFT's layers in a model that wrap one of its modules, ours among them; one around another comes first."""
    return [module for module in unwrap(model).modules() if isinstance(module, BaseTunerLayer)]


def _of_module(model: nn.Module) -> Weights:
    if any(layer.merged for layer in tuner_layers(model)):
        raise IsolateError(
            "adapters are merged into the model, so its base weights are not what they were: call unmerge_adapter() "
            "first, or pass the base's folder"
        )
    here = {name: (parameter, module) for name, _, module, parameter in walk_parameters(model)}
    inner = unwrap(model)
    return _of_tensors(str(getattr(inner, "name_or_path", None) or type(inner).__name__), inner, here)


def _of_tensors(name: str, model: nn.Module, here: Mapping[str, tuple[torch.Tensor, nn.Module]]) -> Weights:
    def check(parameter: str) -> None:
        tensor, module = here[parameter]
        if tensor.is_meta or not is_plain(tensor, module):
            what = "on the meta device" if tensor.is_meta else f"quantised, sharded or offloaded ({tensor.dtype})"
            raise IsolateError(
                f"{parameter!r} of {name!r} is {what}, so its numbers cannot be read: load the model in its own dtype "
                "on one device, or pass its folder"
            )

    shapes = {own: logical_shape(module, own.rpartition(".")[2], tensor) for own, (tensor, module) in here.items()}
    return Weights(name, model, shapes, lambda parameter: here[parameter][0], check)


def _of_state(state: Mapping[str, Any], like: Weights | None) -> Weights:
    if other := [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]:
        raise IsolateError(
            f"{other[0]!r} of the state dict is a {type(state[other[0]]).__name__}, no tensor: pass what "
            "model.state_dict() gives"
        )
    known = {} if like is None else shapes_of(like.model)
    buffers = set() if like is None else {buffer for buffer, _ in unwrap(like.model).named_buffers()}
    buffers |= {name for name in state if name.rpartition(".")[2] in COUNTED and name not in known}
    tensors = {name: t for name, t in state.items() if t.is_floating_point() and name not in buffers}
    if not tensors:
        raise IsolateError("the state dict holds no floating-point tensor: pass what model.state_dict() gives")
    title = f"a state dict of {len(tensors)} tensors"
    model = _bare(tensors) if like is None else like.model
    found: dict[str, torch.Tensor] = {}
    for names in _names(model):
        there = [name for name in names if name in tensors]
        values = [tensors.pop(name) for name in there]
        if values:
            found[names[0]] = values[0]
        for twin, value in zip(there[1:], values[1:], strict=True):
            if value is not values[0] and not torch.equal(value, values[0]):
                raise RegionError(
                    f"{there[0]!r} and {twin!r} differ in the state dict, and are tied in the base: load it into a "
                    "model, or leave one of the two out"
                )
    return _of_tensors(title, model, {name: (tensor, nn.Module()) for name, tensor in (found | tensors).items()})


def _names(model: nn.Module) -> Iterator[list[str]]:
    """All the names of each parameter, its first one first."""
    names = shapes_of(model)
    tied = tied_names(model, names)
    return ([name, *tied.get(name, ())] for name in names)


class _Norm(nn.Module):
    """A norm of which only the numbers are known."""


def _bare(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Modules of these parameters' names, which share their memory: enough to tell what is what, not to compute."""
    children: dict[str, dict[str, nn.Parameter]] = {"": {}}
    shared: dict[Any, nn.Parameter] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        parts = path.split(".") if path else []
        for depth in range(1, len(parts) + 1):
            children.setdefault(".".join(parts[:depth]), {})
        alone = tensor.is_meta or not tensor.numel()
        key = id(tensor) if alone else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        parameter = nn.Parameter(tensor.detach(), requires_grad=False)
        children[path][leaf] = shared.setdefault(key, parameter)
    inner: dict[str, list[str]] = {path: [] for path in children}
    for path in children:
        if path:
            inner[path.rpartition(".")[0]].append(path.rpartition(".")[2])
    modules: dict[str, nn.Module] = {}
    for path, own in children.items():
        module = modules[path] = _module(path.rpartition(".")[2], own, inner[path])
        for leaf, parameter in own.items():
            module.register_parameter(leaf, parameter)
        if path:
            parent, _, leaf = path.rpartition(".")
            modules[parent].add_module(leaf, module)
    return modules[""]


def _module(leaf: str, own: Mapping[str, torch.Tensor], inner: list[str]) -> nn.Module:
    """An empty module of the kind that its name, its parameters and its children speak for."""
    if inner and not own and all(child.isdigit() for child in inner):
        return nn.ModuleList()
    if own.keys() == {"weight"} and own["weight"].ndim == 2 and ("embed" in leaf or leaf in EMBEDDING_NAMES):
        return nn.Embedding(own["weight"].shape[0], own["weight"].shape[1], _weight=own["weight"])
    if own and all(tensor.ndim < 2 for tensor in own.values()) and ("norm" in leaf.lower() or leaf[:2] == "ln"):
        return _Norm()
    return nn.Module()
