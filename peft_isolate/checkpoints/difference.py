"""What a fine-tuning changed, as a stream of tensors, whatever it was made with: Δ = tuned − W0.

A tuned model may be there as weights: then the two are subtracted. Or as an adapter over them: then Δ is what it adds,
never rounded to the dtype of W0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..deltas.base import compare_base
from ..deltas.config import DeltaConfig
from ..deltas.delta import Delta
from ..deltas.in_place import compose_in_place
from ..deltas.layer import DeltaLayer
from ..deltas.targets import tied_names
from ..errors import IsolateError, RegionError
from ..regions.fingerprint import fingerprint
from ..regions.region import is_plain, walk_parameters
from .adapter import CONFIG, Adapter, any_config
from .architecture import folder_of
from .exact import is_exact
from .foreign import carries, chain, check_nothing_beside, equal, load_foreign, merged_delta
from .progress import progress
from .shards import INDEX, SINGLE
from .weights import Source, Weights, check_names, tuner_layers, weights_of

PIECE = 2**20
Pair = tuple[str, torch.Tensor, torch.Tensor]


class Difference(Mapping[str, torch.Tensor]):
    """`{parameter: Δ}`, on the CPU, contiguous, in fp32 (float64 where W0 or the tuned tensor is).

    Each Δ is made when it is asked for, and none is kept.

    Attributes:
        name: Of what was tuned, for messages.
        base: W0.
        touched: Parameters whose Δ can be other than zero, in the base's order: of an adapter those of its support.
    """

    def __init__(self, name: str, base: Weights, touched: Iterable[str]) -> None:
        self.name, self.base = name, base
        self._among = frozenset(touched)
        self.touched = [parameter for parameter in base if parameter in self._among]

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, name: str) -> torch.Tensor:
        before, after = self.pair(name)
        return difference(before, after)

    def pairs(self, names: Iterable[str]) -> Callable[[], Iterator[Pair]]:
        """The iteration over (name, before, after) that `regions.top.top` asks for; after − before is Δ."""
        chosen = list(names)
        return lambda: ((name, *self.pair(name)) for name in progress(chosen, "compare"))

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(before, after) of a parameter: W0 and what it became, or of an adapter zero and Δ. Do not write to them."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Hold no mapping of the tuned model's files any longer, until they are read again."""


def difference_of(
    base: Source | Weights, tuned: Any, *, revision: str | None = None, tuned_revision: str | None = None
) -> Difference:
    """What turns a base into a tuned model.

    Args:
        base: W0, see `base_weights`.
        tuned: One of
            - a model, a state dict, a checkpoint's folder or Hub id: of the base's architecture;
            - a PeftModel: Δ is the sum of its active adapters, `Σ α·Δ` with their soft masks and what they hold; of
              PEFT's own methods what their layers merge, computed in float64 (so a LoRA's B·A);
            - the folder or Hub id of an adapter, of this library or of PEFT.
        revision, tuned_revision: Of the Hub.

    Raises:
        RegionError: A tensor is new, missing or resized; an adapter is another model's; or it carries whole tensors
            beside its deltas (`modules_to_save`, trained tokens, biases), which no region of a base has: merge it, and
            pass the merged model.
        BaseMismatchError: An adapter was trained on another base, as far as can be told.
        IsolateError: Adapters are merged or disabled, or change no weights; an exact difference, which must be merged
            first; see also `weights_of`.
        FormatError: A file is damaged.
    """
    if isinstance(tuned, Difference):
        raise IsolateError("this is a difference already: pass the tuned model that it was made of")
    base = base_weights(base, tuned, revision, tuned_revision)
    if isinstance(tuned, nn.Module) and (isinstance(tuned, PeftModel) or tuner_layers(tuned)):
        return _Live(base, tuned)
    if isinstance(tuned, str | os.PathLike):
        folder = folder_of(tuned, tuned_revision)
        if is_exact(folder):
            raise IsolateError(
                f"{os.fspath(tuned)!r} is an exact difference, which speaks of files: merge(base, it, out=…) first, "
                "and pass the folder that this writes"
            )
        if _is_adapter(folder):
            return _of_folder(base, tuned, folder, tuned_revision)
    return Whole(base, weights_of(tuned, tuned_revision, like=base))


def base_weights(
    base: Source | Weights, tuned: Any, revision: str | None = None, tuned_revision: str | None = None
) -> Weights:
    """W0, as `weights_of` reads it; but a state dict has the names, roles and ties of what was tuned from it.

    That is, where the tuned one is a module or a checkpoint's folder: state dicts and adapters' folders have none.
    """
    if isinstance(base, Weights) or not isinstance(base, Mapping):
        return weights_of(base, revision)
    tells = isinstance(tuned, nn.Module | Weights)
    if isinstance(tuned, str | os.PathLike):
        folder = folder_of(tuned, tuned_revision)
        tells = not is_exact(folder) and not _is_adapter(folder)
    return weights_of(base, like=weights_of(tuned, tuned_revision) if tells else None)


class Whole(Difference):
    """Of two models' weights.

    Args:
        base, tuned: The two.
        remedy: For the message where one has tensors that the other has not.
    """

    def __init__(
        self, base: Weights, tuned: Weights, remedy: str = "a difference is one of tensors that both have"
    ) -> None:
        check_names(base, tuned, remedy)
        for name in base:
            base.check_plain(name)
            tuned.check_plain(name)
        super().__init__(tuned.name, base, base)
        self.tuned = tuned

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.base.read(name), self.tuned.read(name)

    def let_go(self) -> None:
        if self.tuned.checkpoint is not None:
            self.tuned.checkpoint.shards.let_go()


class _Added(Difference):
    """Of an adapter, which is a difference."""

    def __getitem__(self, name: str) -> torch.Tensor:
        dtype = self.base.delta_dtype(name)
        if name not in self._among:
            return torch.zeros(self.base.shapes[name], dtype=dtype, device="cpu")
        return self._delta(name, dtype).to("cpu", dtype).contiguous()

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        nothing = torch.zeros((), dtype=self.base.delta_dtype(name), device="cpu").expand(self.base.shapes[name])
        return nothing, self[name] if name in self._among else nothing

    def _delta(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError

    @staticmethod
    def _sum(shape: tuple[int, ...], dtype: torch.dtype, acting: list[tuple[Delta, float]]) -> torch.Tensor:
        """Σ α·(held + (1 − I)·Δ), by the function that composes weights."""
        for delta, _ in acting:
            delta.check_here()
        parts = [(part, alpha) for delta, alpha in acting for part in delta.parts()]
        total = torch.zeros(shape, dtype=dtype, device=parts[0][0].numbers.device)
        compose_in_place(total, [part for part, _ in parts], [alpha for _, alpha in parts], disjoint=len(acting) == 1)
        return total


class _Saved(_Added):
    """Of an adapter of this library, in a folder."""

    def __init__(self, base: Weights, adapter: Adapter) -> None:
        trained, held, _ = adapter.resolve(base.model)
        super().__init__(adapter.name, base, [*trained, *held])
        adapter.check_base(base)
        for name, tensor in adapter.beside(base.model).items():
            # PEFT writes embeddings along that nobody trained.
            if name not in base or base.shapes[name] != tuple(tensor.shape) or not equal(tensor, base.read(name)):
                raise carries(adapter.name, repr(name))
        if tokens := adapter.tokens(base.model):
            raise carries(adapter.name, f"rows of {next(iter(tokens))!r}")
        self.adapter = adapter

    def _delta(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self._sum(self.base.shapes[name], dtype, [(self.adapter.delta(name), 1.0)])

    def let_go(self) -> None:
        self.adapter.let_go()


class _Live(_Added):
    """Of the active adapters of a PeftModel."""

    def __init__(self, base: Weights, model: nn.Module, name: str | None = None, has_base: bool = True) -> None:
        self.inside = weights_of(model)
        name = self.inside.name if name is None else name
        check_names(base, self.inside, "an adapter is one over the base's own tensors")
        self.around: dict[str, BaseTunerLayer] = {}
        outermost: dict[int, BaseTunerLayer] = {}
        for each in tuner_layers(model):
            outermost.setdefault(id(each.get_base_layer()), each)
        for parameter, _, module, _ in walk_parameters(model, tied=True):
            if (layer := outermost.get(id(module))) is not None and _acts(layer, parameter.rpartition(".")[2]):
                self.around[parameter] = layer
        for first, others in tied_names(model, base).items():
            if changed := [parameter for parameter in (first, *others) if parameter in self.around]:
                raise RegionError(
                    f"an adapter of {name!r} changes {changed[0]!r}, and {first!r} is tied to {others}: a difference "
                    "on the one would be missed by the other; leave embeddings and head out of the adapter"
                )
        if any(layer.disable_adapters for layer in self.around.values()):
            raise IsolateError(
                f"the adapters of {name!r} are disabled: call enable_adapter_layers(), or pass the base"
            )
        check_nothing_beside(model, name)
        if not outermost:
            raise IsolateError(f"{name!r} has adapters that change no weights, such as a prompt: there is no Δ")
        if has_base:
            self._check_base(base, model)
        super().__init__(name, base, self.around)

    def _check_base(self, base: Weights, model: nn.Module) -> None:
        """The model's own base tells, where its numbers are here; else what its adapters remember of theirs."""
        here = {
            name: parameter
            for name, _, module, parameter in walk_parameters(model)
            if not parameter.is_meta and is_plain(parameter, module)
        }
        if here:
            recorded: list[str | None] = [fingerprint(here.items())]
        else:
            configs = getattr(model, "peft_config", {}).values()
            recorded = [(getattr(config, "resolved", None) or {}).get("base") for config in configs]
        for each in recorded:
            if each is not None:
                compare_base(each, base.items())

    def _delta(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        layer: Any = self.around[name]
        own = name.rpartition(".")[2]
        if isinstance(layer, DeltaLayer):
            deltas, active = layer.deltas(own), layer.active_adapters
            chosen = [
                (deltas[a], alpha) for a, alpha in layer.scaling.items() if alpha and a in deltas and a in active
            ]
            return self._sum(self.base.shapes[name], dtype, chosen)
        prefix = name.removesuffix(own)
        return merged_delta(layer, own, lambda parameter: self.base.read(prefix + parameter), self.name)


def _of_folder(base: Weights, tuned: str | os.PathLike[str], folder: Path, revision: str | None) -> Difference:
    if isinstance(any_config(folder), DeltaConfig):
        return _Saved(base, Adapter(tuned, revision))
    return _Live(base, load_foreign(base, folder), os.fspath(tuned), has_base=False)


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not any((folder / model).is_file() for model in (SINGLE, INDEX))


def _acts(layer: BaseTunerLayer, own: str) -> bool:
    """Whether an active adapter may change the parameter `own` of the module that a layer, or several, wrap."""
    if isinstance(layer, DeltaLayer):
        there = layer.deltas(own) if own in layer.parameter_names else {}
        return any(name in there and layer.scaling[name] for name in layer.active_adapters)
    return any(each.active_adapters for each in chain(layer))


def difference(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """Δ = tuned − base on the CPU, in fp32, or in float64 where one of them is; a few scalars at a time are cast."""
    wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    found = torch.empty(tuned.shape, dtype=wide, device="cpu")
    pieces = (tensor.detach().reshape(-1).split(PIECE) for tensor in (found, base, tuned))
    for delta, before, after in zip(*pieces, strict=True):
        torch.sub(after.to("cpu", wide), before.to("cpu", wide), out=delta)
    return found
