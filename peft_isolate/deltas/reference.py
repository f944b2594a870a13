"""A model as it was at a moment, computed with the model itself: no second model is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import IsolateError
from ..regions.fingerprint import as_bytes, fingerprint
from ..regions.region import PLAIN_DTYPES, base_module
from .adapters import name_in_state_dict
from .layer import DeltaLayer
from .packed_delta import PackedDelta

# LoRA's ways to begin that write to the base, as `init_lora_weights` names them.
TAKE_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class _Acting(NamedTuple):
    """What acts in a module: its adapters, and α (or what it has for that) of each."""

    adapters: tuple[str, ...] = ()
    scales: Mapping[str, float] = MappingProxyType({})


_NOTHING = _Acting()


class Reference:
    """A model as it was at a moment, to be computed with the model itself while that is trained on.

    An adapter that contributed nothing to a module then (its numbers were all zero, as they begin) is left out of it:
    that costs no memory. Of what else could learn, a copy is kept: for adapters that go on learning from where they
    were, and for models without any. Which adapters were active, and at which scale, is remembered.

    Made by `now` or `base`, before the model is wrapped or after.
    """

    def __init__(self, acting: dict[str, _Acting], kept: dict[str, torch.Tensor], rest: str) -> None:
        self._acting, self._kept, self._rest = acting, kept, rest
        self._digest: str | None = None

    @classmethod
    def now(cls, model: nn.Module) -> Reference:
        """The model as it is now.

        Raises:
            IsolateError: An adapter is merged, has no layers to be left out of (prompt learning), or the model's
                numbers are not here (on the meta device, or partitioned by ZeRO-3).
        """
        _check(model)
        acting = _acting_in(model)
        out = _left_out(model, acting)
        learning = _learning(model, out)
        rest = ((n, p) for n, p in _parameters(model).items() if n not in learning and id(p) not in out)
        return cls(acting, _copied(learning), _sampled(rest))

    @classmethod
    def base(cls, model: nn.Module) -> Reference:
        """The model without any adapter. Of what learns beside adapters, or without any, it is what that is now.

        Raises:
            IsolateError: As `now` does; or an adapter has changed the base itself, as PiSSA does when it begins.
        """
        _check(model)
        _check_base(model)
        return cls({}, _copied(_learning(model, _left_out(model, {}))), "the base")

    def uncovered(self, model: nn.Module) -> str | None:
        """A parameter of the model that learns and is neither kept nor left out; None where there is none.

        What was made to learn after the reference was made will not be what it was.
        """
        learning = _learning(model, _left_out(model, self._acting))
        return next((name for name in learning if name not in self._kept), None)

    @property
    def n_bytes(self) -> int:
        """What the copy takes; 0 where it is enough to leave adapters out."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    def digest(self) -> str:
        """Of what acts, the copied numbers, and a sample of all others, in hex: another reference has another."""
        if self._digest is None:
            acting = sorted((name, acts.adapters, sorted(acts.scales.items())) for name, acts in self._acting.items())
            hashed = hashlib.sha256(f"{acting} {self._rest}".encode())
            for name, tensor in sorted(self._kept.items()):
                hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                hashed.update(as_bytes(tensor))
            self._digest = hashed.hexdigest()
        return self._digest

    @contextmanager
    def used(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model computes as the reference; afterwards it is as it was, also after an exception.

        Nothing but flags and, where there is a copy, numbers are exchanged meanwhile: `requires_grad`, modes and
        random states stay. Under FSDP2 no graph of the model may be alive where there is a copy.

        Args:
            model: The model that the reference was made of, by now perhaps wrapped by DDP, FSDP2 or `torch.compile`.

        Raises:
            IsolateError: It is another model, or an adapter is merged.
        """
        _check(model)
        with self.left_out(model), self._exchanged(model) if self._kept else nullcontext():
            yield

    @contextmanager
    def left_out(self, model: nn.Module) -> Iterator[None]:
        """Inside, the adapters that acted act, at the scale they had, and no others; no numbers are exchanged."""
        with ExitStack() as stack:
            for name, module in switches(model).items():
                stack.enter_context(_acts(module, self._acting.get(name, _NOTHING)))
            yield

    @contextmanager
    def _exchanged(self, model: nn.Module) -> Iterator[None]:
        """The copies in the place of the model's own numbers."""
        _forget_gathered(model)
        parameters = _parameters(model)
        if missing := sorted(self._kept.keys() - parameters.keys()):
            raise IsolateError(
                f"the model has no parameter {missing[0]!r}, which it had when its reference was made: make the "
                "reference of this model, and wrap it neither by FSDP1 nor in another adapter afterwards"
            )
        kept = [(parameters[name], self._at_home(name, parameters[name])) for name in self._kept]
        before = [(parameter, _numbers_of(parameter)) for parameter, _ in kept]
        try:
            _put(kept)
            _forget_gathered(model)
            yield
        finally:
            _put(before)  # all of them, however many were exchanged
            _forget_gathered(model)

    def _at_home(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """The copy, moved and sharded as the parameter has been since."""
        kept, local = self._kept[name], _local(parameter)
        if kept.shape != local.shape:
            if not isinstance(parameter, DTensor) or kept.shape != parameter.shape:
                raise IsolateError(
                    f"{name!r} has shape {tuple(local.shape)} and had {tuple(kept.shape)} when its reference was "
                    "made: it was partitioned or resized since; DDP and FSDP2 are what a reference can follow"
                )
            self.digest()  # while the copy is whole
            whole = kept.to(parameter.device)
            kept = distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local()
        self._kept[name] = kept = kept.to(local.device)
        return kept


def bytes_to_copy(model: nn.Module) -> int:
    """What the copy of `Reference.now(model)` would take: nothing is copied. Raises as it does."""
    _check(model)
    learning = _learning(model, _left_out(model, _acting_in(model)))
    return sum(_here(name, parameter).nbytes for name, parameter in learning.items())


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and `torch.compile`; any other as it is."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", model)
        if inner is model:
            return model
        model = inner


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name_in_state_dict(name): parameter for name, parameter in unwrapped(model).named_parameters()}


def switches(model: nn.Module) -> dict[str, Any]:
    """{name: module} of whatever can leave its adapters out."""
    kinds, modules = (BaseTunerLayer, AuxiliaryTrainingWrapper), unwrapped(model).named_modules()
    return {name_in_state_dict(name): module for name, module in modules if isinstance(module, kinds)}


def _check(model: nn.Module) -> None:
    """Raise `IsolateError` where leaving adapters out would change the base, or leave something in."""
    for name, config in getattr(unwrapped(model), "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise IsolateError(
                f"the adapter {name!r} is a learned prompt ({type(config).__name__}), which no layer can leave out: "
                "take an adapter on weights, of this library or LoRA"
            )
    for name, module in switches(model).items():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise IsolateError(
                f"{module.merged_adapters} is merged into {name!r}, so the model without it is not at hand: "
                "unmerge_adapter() first"
            )


def _check_base(model: nn.Module) -> None:
    """Raise `IsolateError` where an adapter has taken numbers out of the base."""
    for name, config in getattr(unwrapped(model), "peft_config", {}).items():
        init = getattr(config, "init_lora_weights", None)
        if isinstance(init, str) and init.startswith(TAKE_FROM_BASE):
            raise IsolateError(
                f"the adapter {name!r} began with init_lora_weights={init!r}, which has changed the base, so the base "
                "is not at hand: begin with init_lora_weights=True"
            )


def _adds_nothing(module: Any, adapter: str) -> bool:
    """Whether a module gives the bits that it gives without an adapter; False where that is not known."""
    if isinstance(module, DeltaLayer):
        deltas = [d for name in module.parameter_names for a, d in module.deltas(name).items() if a == adapter]
        return not any(isinstance(delta, PackedDelta) or any(n.any() for n in delta.parameters()) for delta in deltas)
    if isinstance(module, LoraLayer):
        if adapter in module.lora_variant:
            return False  # DoRA and others compute in other ways, also with zeros
        factors = [*_numbers(module, adapter, ("lora_B", "lora_embedding_B"))]
        return not any(factor.any() for factor in factors)
    if isinstance(module, ModulesToSaveWrapper):
        mine = dict(module.modules_to_save[adapter].named_parameters()) if adapter in module.modules_to_save else {}
        theirs = dict(module.original_module.named_parameters())
        return all(torch.equal(number, theirs[name]) for name, number in mine.items())
    return False


def _acting_in(model: nn.Module) -> dict[str, _Acting]:
    """{name of a switch: what acts there now}."""
    acting: dict[str, _Acting] = {}
    for name, module in switches(model).items():
        active = () if module.disable_adapters else module.active_adapters
        names = tuple(adapter for adapter in active if not _adds_nothing(module, adapter))
        scales = getattr(module, "scaling", {})
        acting[name] = _Acting(names, {adapter: scales[adapter] for adapter in names if adapter in scales})
    return acting


def _left_out(model: nn.Module, acting: Mapping[str, _Acting]) -> set[int]:
    """The identities of the adapters' parameters that do not act."""
    out: set[int] = set()
    for name, module in switches(model).items():
        acts = acting.get(name, _NOTHING).adapters
        out |= {id(p) for p in _own(module)} - {id(p) for adapter in acts for p in _numbers(module, adapter)}
    return out


def _learning(model: nn.Module, out: set[int]) -> dict[str, nn.Parameter]:
    """What learns, less what is left out."""
    return {name: p for name, p in _parameters(model).items() if p.requires_grad and id(p) not in out}


def _sampled(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A digest of names and shapes, and of a few numbers of each tensor that can be read."""
    names, readable = [], {}
    for name, parameter in parameters:
        names.append(f"{name} {parameter.dtype} {tuple(parameter.shape)}")
        plain = type(parameter) in (nn.Parameter, torch.Tensor) and not parameter.is_meta
        if plain and parameter.dtype in PLAIN_DTYPES and parameter.numel():
            readable[name] = parameter.detach()
    return hashlib.sha256("\n".join([*names, fingerprint(readable.items())]).encode()).hexdigest()


def _own(module: Any) -> Iterator[nn.Parameter]:
    """What a wrapper has beside the module that it wraps: the parameters of its adapters."""
    inner = {id(parameter) for parameter in base_module(module).parameters()}
    return (parameter for parameter in module.parameters() if id(parameter) not in inner)


def _numbers(module: Any, adapter: str, containers: Iterable[str] | None = None) -> Iterator[nn.Parameter]:
    """The parameters of an adapter in a module."""
    for container in module.adapter_layer_names if containers is None else containers:
        of_adapters: Any = attrgetter(container)(module)  # a path, of what learns single tokens
        if adapter in of_adapters:
            found = of_adapters[adapter]
            yield from [found] if isinstance(found, nn.Parameter) else found.parameters()


def _copied(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: _here(name, parameter).clone() for name, parameter in parameters.items()}


def _here(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The numbers of it that are on this process. Raises `IsolateError` where they cannot be copied."""
    if parameter.is_meta or hasattr(parameter, "ds_id"):
        raise IsolateError(
            f"{name!r} is {'on the meta device' if parameter.is_meta else 'partitioned by ZeRO-3'}, so its numbers "
            "cannot be kept: make the reference where they are, or begin with a fresh adapter, which needs no copy"
        )
    return _local(parameter.detach())


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """What of it is on this process."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@contextmanager
def _acts(module: Any, acting: _Acting) -> Iterator[None]:
    """A module in which these adapters act.

    By its flags, as PEFT's own `disable_adapter` sets them, but not by that: it also turns `requires_grad` on and off,
    and back on where a user had turned it off; FSDP2 would remember the wrong one.
    """
    before = module._disable_adapters, module._active_adapter
    scales = dict(module.scaling) if acting.scales else {}
    try:
        module._disable_adapters = not acting.adapters
        if acting.adapters:
            module._active_adapter = list(acting.adapters)
        if acting.scales:
            module.scaling.update(acting.scales)
        yield
    finally:
        module._disable_adapters, module._active_adapter = before
        if acting.scales:
            module.scaling.update(scales)


def _numbers_of(parameter: nn.Parameter) -> torch.Tensor:
    """What `_put` brings back. FSDP2 holds on to the memory of its shards, so of these a copy."""
    return _local(parameter.detach()).clone() if isinstance(parameter, DTensor) else parameter.data


@torch.no_grad()
def _put(numbers: Iterable[tuple[nn.Parameter, torch.Tensor]]) -> None:
    torch.clear_autocast_cache()  # it would give the numbers that a parameter had before
    for parameter, of_parameter in numbers:
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(of_parameter)
        else:  # by the pointer: what a graph has saved of the parameter is right again afterwards
            parameter.data = of_parameter


def _forget_gathered(model: nn.Module) -> None:
    """FSDP2 may have kept gathered weights from the last forward, in the place of the shards that are exchanged."""
    for module in unwrapped(model).modules():
        if isinstance(module, FSDPModule):
            module.reshard()
