"""The layer that wraps one module of the base model and adds the deltas of its adapters to its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import IsolateError
from ..regions.region import PLAIN_DTYPES, device_of, is_plain
from ..regions.stored import Place
from .beside import add_beside
from .compose import compose
from .delta import HELD, Delta, all_finite
from .in_place import Change, changes
from .linear import linear
from .packed import Packing
from .packed_delta import make_delta
from .scratch import shared
from .soft_mask import SoftMask
from .support import WHOLE, Support, read, write
from .terms import Part, Terms, as_finite

# What accelerate hangs on a module to tell whether it has hooked that very module: never the inner one's.
NOT_SHARED = ("_hf_hook", "_old_forward")


class DeltaLayer(nn.Module, BaseTunerLayer):
    """Wraps a module of any type; holds, for each targeted parameter and adapter, one `Delta`.

    The deltas of the parameter `weight` stand in an `nn.ModuleDict` called `<prefix>weight`, by adapter name, and so
    on for each parameter. (A ModuleDict, not a ParameterDict: trainers that clone an adapter under another name look
    for ".default." inside the parameter's name.)

    Args:
        base_layer: The module to wrap; its parameters stay as they are, frozen.
        prefix: The method's prefix, as PEFT knows it, such as "halfft_".
    """

    other_param_names = ("scaling",)

    def __init__(self, base_layer: nn.Module, prefix: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prefix = prefix
        self.adapter_layer_names = ()
        # One entry an adapter, in the order they were added: the order in which deltas are summed.
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._scratch = shared()
        # The last linear one of the model: after it come head and loss, where the memory of a training step peaks.
        self.is_last = False
        # While adapters are merged: {parameter: [(support, its index, W0 on it)]}.
        self._originals: dict[str, list[tuple[Support, torch.Tensor, torch.Tensor]]] = {}

    def __getattr__(self, name: str) -> Any:
        """What other code asks a module for, it may ask its wrapper for; a targeted parameter is the composed one.

        Some modules read a child's parameters instead of calling it (`nn.MultiheadAttention`, Mamba's mixer): with W0
        they would silently leave the delta out.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            base_layer = self.__dict__.get("_modules", {}).get("base_layer")
            if base_layer is None or name in NOT_SHARED:
                raise
        return self._composed(name) if name in base_layer._parameters else getattr(base_layer, name)

    @property
    def weight(self) -> Any:
        """The weight the layer computes with: composed, or W0 where no adapter acts. To write to W0, take
        `get_base_layer().weight`.
        """
        return self._composed("weight")

    @property
    def bias(self) -> Any:
        """As `weight`."""
        return self._composed("bias")

    def _composed(self, parameter_name: str) -> Any:
        if self.disable_adapters and self.merged:
            return self.base_parameter(parameter_name)
        w0 = getattr(self.base_layer, parameter_name)
        if self.merged or self.disable_adapters or parameter_name not in self.parameter_names:
            return w0
        if self.path == "side":
            # Asked for its dtype or device, most often. torchao's tensors compute, so they must have the deltas, too;
            # a packed weight, or one that is not here, nobody can use by mistake.
            if type(w0) in (nn.Parameter, torch.Tensor) or w0.is_meta or w0.dtype not in PLAIN_DTYPES:
                return w0
            w0 = w0.dequantize()
        terms = self._terms(parameter_name, self.active_adapters)
        return w0 if terms is None else compose(w0, terms)

    def update_layer(
        self,
        adapter_name: str,
        trained: Mapping[str, Place],
        held: Mapping[str, Place] | None = None,
        masks: Mapping[str, SoftMask] | None = None,
        packings: Mapping[str, Packing] | None = None,
        *,
        zero: bool = True,
        inference_mode: bool = False,
        sibling: str | None = None,
    ) -> None:
        """Add an adapter's deltas, or put new ones in their place.

        Args:
            adapter_name: The adapter.
            trained: For each targeted parameter of the base layer (its name there), what learns.
            held: Likewise, what earlier rounds left.
            masks: Likewise, the soft mask of what learns, for those that have one.
            packings: Likewise, what is known of a packed delta.
            zero: Start at zero, see `Delta`.
            inference_mode: The deltas shall not be trained.
            sibling: An adapter made from the same config object. What is not a parameter is taken over from it:
                trainers that clone an adapter copy its parameters only.
        """
        held, masks = held or {}, masks or {}
        for parameter_name in dict.fromkeys([*trained, *held]):
            container = f"{self.prefix}{parameter_name}"
            if container not in self.adapter_layer_names:
                setattr(self, container, nn.ModuleDict())
                self.adapter_layer_names = (*self.adapter_layer_names, container)
            parameter = getattr(self.get_base_layer(), parameter_name)
            dtype = parameter.dtype if parameter.dtype in PLAIN_DTYPES else torch.float32
            like = torch.empty(0, dtype=dtype, device=device_of(parameter, self.get_base_layer()))
            of_parameter = (masks.get(parameter_name), (packings or {}).get(parameter_name))
            delta = make_delta(trained.get(parameter_name), held.get(parameter_name), like, zero, *of_parameter)
            if sibling is not None:
                delta.copy_state(self.deltas(parameter_name)[sibling])
            getattr(self, container)[adapter_name] = delta
        self.scaling[adapter_name] = self.scaling.get(sibling or adapter_name, 1.0)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def get_base_layer(self) -> nn.Module:
        """The module that was wrapped. (PEFT's own goes on to look for one inside it, where there never is one.)"""
        base: Any = self._modules["base_layer"]
        return base

    def deltas(self, parameter_name: str) -> Mapping[str, Delta]:
        """{adapter: its delta on this parameter}, in the order the adapters were added."""
        return self._modules[f"{self.prefix}{parameter_name}"]  # type: ignore[return-value]

    @property
    def parameter_names(self) -> list[str]:
        """The parameters of the base layer that some adapter has a delta on."""
        return [container.removeprefix(self.prefix) for container in self.adapter_layer_names]

    def _terms(self, parameter_name: str, adapters: list[str]) -> Terms | None:
        """The deltas of these adapters on a parameter, in the order they were added; None if there are none."""
        deltas = self.deltas(parameter_name)
        chosen = [name for name in self.scaling if name in adapters and name in deltas]
        if not chosen:
            return None
        parts = [(part, self.scaling[name]) for name in chosen for part in deltas[name].parts()]
        return Part.terms([part for part, _ in parts], [scale for _, scale in parts], disjoint=len(chosen) == 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward, with `W0 + Σ α·Δ` in place of each targeted parameter W0."""
        # Not `self.base_layer`, which goes through two __getattr__: this runs for every layer and token.
        base: Any = self._modules["base_layer"]
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return base(*args, **kwargs)
        if self.merged_adapters:
            return base(*args, **kwargs)
        if self.path == "side":
            return add_beside(self, args, kwargs)
        active = self.active_adapters
        found = {name: self._terms(name, active) for name in self.parameter_names}
        terms = {name: of_name for name, of_name in found.items() if of_name is not None}
        if not terms:
            return base(*args, **kwargs)
        if "weight" in terms and len(args) == 1 and not kwargs and self.is_plain_linear:
            bias = base.bias
            if "bias" in terms:
                bias = compose(bias, terms["bias"])
            result = linear(args[0], base.weight, bias, terms["weight"], transposed=isinstance(base, Conv1D))
            if self.is_last and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._scratch.give_back()
            return result
        composed = {name: compose(getattr(base, name), of_name) for name, of_name in terms.items()}
        return torch.func.functional_call(base, composed, args, kwargs)

    @property
    def path(self) -> str:
        """ "compose" where every targeted W0 and its deltas are plain local tensors; "side" where one is
        quantised, sharded or offloaded: then the layer adds what the deltas contribute to what the base layer gives,
        see `beside`.
        """
        base: Any = self._modules["base_layer"]
        for name in self.parameter_names:
            if not is_plain(getattr(base, name), base):
                return "side"
            for delta in self.deltas(name).values():
                # A delta has no modules in it: `parameters()` would look for some, for longer than all of the rest.
                for numbers in delta._parameters.values():
                    if numbers is not None and not is_plain(numbers, delta):
                        return "side"
        return "compose"

    @property
    def is_plain_linear(self) -> bool:
        """Whether the base layer computes x @ W.T + b and nothing else: no subclass's forward, no hooks."""
        base: Any = self._modules["base_layer"]
        plain = type(base).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in base.__dict__
        return plain and not (
            base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the composed weights in the base layer's parameters; W0 is kept on the support, for `unmerge`.

        Adapters that are merged already are composed again together with the new ones, from W0: rounding one after the
        other would give other weights than the adapted model has.

        Args:
            safe_merge: Check first that every composed weight is finite.
            adapter_names: The adapters, the active ones by default. Those that this layer has no delta of count as
                merged, too: the layer is W0 then, whatever is active.

        Raises:
            IsolateError: With `safe_merge`, a composed weight is NaN or infinite; nothing of this layer was changed.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        self.check_mergeable()
        if safe_merge:
            self.check_finite(names)
        merged = [*self.merged_adapters, *names]
        for name, w0, terms in self._to_merge(merged):
            parameter = getattr(self.get_base_layer(), name).detach()
            found = changes(parameter, w0, terms)
            self._keep(name, w0, merged, found)
            for change in found:
                write(parameter, change.support, change.at, change.after)
        self.merged_adapters = merged

    def check_mergeable(self, where: str = "this layer") -> None:
        """Raise `IsolateError` where the base's weights are no plain local tensors to write to."""
        if self.path == "side":
            raise IsolateError(
                f"{where} is quantised, sharded or offloaded ({type(self.get_base_layer()).__name__}), so nothing can "
                "be merged into it exactly: load the base in its own dtype on one device and merge there, or use the "
                "adapter unmerged"
            )

    @torch.no_grad()
    def check_finite(self, adapter_names: list[str] | None = None, where: str = "this layer") -> None:
        """Raise `IsolateError` if merging these adapters (by default the active) gives a NaN or infinite weight."""
        names = self.active_adapters if adapter_names is None else adapter_names
        for name, w0, terms in self._to_merge([*self.merged_adapters, *names]):
            if not all_finite(compose(w0, terms)):
                raise IsolateError(
                    f"merging {names} makes {name!r} of {where} NaN or infinite: the training diverged or the "
                    "adapter's file is damaged; nothing was merged, load a sound adapter"
                )

    def _to_merge(self, adapters: list[str]) -> Iterator[tuple[str, torch.Tensor, Terms]]:
        """(parameter, W0, terms) for each parameter that some of these adapters has a delta on."""
        for name in self.parameter_names:
            terms = self._terms(name, adapters)
            if terms is not None:
                yield name, self.base_parameter(name), terms

    def _keep(self, name: str, w0: torch.Tensor, adapters: list[str], found: list[Change]) -> None:
        """Keep W0 on the support of these adapters' deltas, once where several have the same or one has all."""
        at_hand = {id(change.at): change.before for change in found}
        kept = self._originals.setdefault(name, [])
        deltas = (delta for adapter, delta in self.deltas(name).items() if adapter in adapters)
        parts = [part for delta in deltas for part in delta.parts()]
        for numbers, support, index, _, _ in sorted(parts, key=lambda part: not part.support.is_dense):
            if support.is_dense:
                support, index = Support(WHOLE), index[:0]
            if not any(other.is_dense or (other == support and torch.equal(at, index)) for other, at, _ in kept):
                before = at_hand.get(id(index))
                if before is None:
                    before = read(w0, support, index, numbers.shape).clone()
                kept.append((support, index, before))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W0 back, bit for bit."""
        for name in self._originals:
            parameter = getattr(self.get_base_layer(), name).detach()
            if parameter.is_contiguous():
                self._restore(name, parameter)
            else:
                parameter.copy_(self.base_parameter(name))
        self._originals = {}
        self.merged_adapters = []

    def base_parameter(self, name: str) -> torch.Tensor:
        """W0, also while adapters are merged: then a copy."""
        parameter = getattr(self.get_base_layer(), name).detach()
        if name not in self._originals:
            return parameter
        restored = parameter.clone(memory_format=torch.contiguous_format)
        self._restore(name, restored)
        return restored

    def _restore(self, name: str, merged: torch.Tensor) -> None:
        """Put W0 in the place of a contiguous merged weight."""
        # What was kept first was W0 as well, so the order does not matter.
        for support, index, kept in self._originals[name]:
            # The model may have moved to another device since it was merged.
            write(merged, support, index.to(merged.device), kept.to(merged.device))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's α in `W0 + α·Δ`. Of run time only: not saved.

        Raises:
            IsolateError: The adapter is merged, or α is not a finite number.
        """
        if adapter not in self.scaling:
            return
        if adapter in self.merged_adapters:
            raise IsolateError(
                f"the scale of {adapter!r} cannot become {scale} while the adapter is merged: call "
                "unmerge_adapter() first"
            )
        if (alpha := as_finite(scale)) is None:
            raise IsolateError(f"the scale of {adapter!r} must be a finite number, got {scale!r}")
        self.scaling[adapter] = alpha

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' α by `scale`."""
        if scale == 1:
            return
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.set_scale(adapter, self.scaling[adapter] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the active adapters' α by `scale`; without it (or by 0) put them back to 1."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.set_scale(adapter, self.scaling[adapter] / scale if scale else 1.0)

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        """What is held stays frozen: PEFT calls this wherever it makes an adapter's parameters trainable."""
        for container in self.adapter_layer_names:
            for delta in getattr(self, container).values():
                for name, numbers in delta.named_parameters():
                    if name == HELD:
                        numbers.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move to the base layer's device, keep the dtype: PEFT would round an fp32 delta to a bf16 base's."""
        for container in self.adapter_layer_names:
            deltas = getattr(self, container)
            if adapter_name in deltas and not any(p.is_meta for p in deltas[adapter_name].parameters()):
                base = self.get_base_layer()
                parameter = getattr(base, container.removeprefix(self.prefix))
                deltas[adapter_name].to(device_of(parameter, base) if device is None else device)

    def extra_repr(self) -> str:
        scaled = {name: scale for name, scale in self.scaling.items() if scale != 1.0}
        return f"adapters={list(self.scaling)}, {f'α={scaled}, ' if scaled else ''}path={self.path}"
