"""PEFT's contract, kept once for all methods: a method brings a config, this brings the rest."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import IsolateError, RegionError
from ..regions.region import Region, base_bytes
from ..regions.roles import roles
from .about.readme import remember
from .adapters import add_weighted, deltas_of, layers_of
from .base import check_base, fingerprint_of
from .config import CHOSEN_BY, DeltaConfig
from .delta import TRAINED, Delta
from .distributed import check_loading, check_same_everywhere
from .layer import DeltaLayer
from .packed import inference_only
from .state import check_loaded, to_save
from .targets import (
    NEW_HEADS,
    check_name,
    is_excluded,
    is_targeted_parameter,
    saved_modules,
    token_modules,
    trained_beside,
)

logger = logging.getLogger(__name__)


class DeltaTuner(BaseTuner):
    """Injects a `DeltaLayer` wherever the config's region touches a module. Subclasses set `prefix`."""

    tuner_layer_cls = DeltaLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # declared like this by PEFT

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Choose the region, or check the recorded one, before anything of the model is touched; then wrap."""
        config = self.peft_config[adapter_name]
        if hasattr(model, "get_base_model"):
            raise IsolateError(
                "the model is a PeftModel already: add_adapter() adds another adapter, merge_and_unload() gives a "
                "plain model to wrap"
            )
        if hasattr(model, "_orig_mod"):
            raise IsolateError("the model is compiled already, under names of its own: wrap it first, compile it then")
        if any(layer.merged for layer in layers_of(model).values()):
            raise IsolateError(
                f"adapters are merged, and the layers of {adapter_name!r} would not be: unmerge_adapter() first"
            )
        if config.packed is not None and not config.inference_mode:
            raise inference_only(f"the adapter {adapter_name!r}")
        resolved = config.resolve(model)
        parts = (*resolved, config.packings(resolved))
        self._trained, self._held, self._masks, self._packings = (_by_module(of_part) for of_part in parts)
        self._check_wrappable(model, config)
        check_name(model, adapter_name)
        check_loading([*resolved.trained.values(), *resolved.held.values()], bool(resolved.masks), config.packed)
        before = dict(vars(config))
        if config.resolved is None:
            region = resolved.region
            for remark in config.remarks(resolved.masks):
                logger.log(logging.INFO if resolved.masks else logging.WARNING, remark)
            config.record(region, model, fingerprint_of(model, config), masks=resolved.masks)
            chosen_by = ", ".join(f"{name}={getattr(config, name)!r}" for name in (*CHOSEN_BY, *config.chosen_by))
            logger.info("%s(%s) chose %r", type(config).__name__, chosen_by, region)
            _warn_if_large(region, model, config)
            _warn_of_a_new_head(region, model, config)
        else:
            check_base(model, config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            config.__dict__.update(before)
            raise
        finally:
            # PEFT shortens and expands this list for its own matching; the config shall say what the user said.
            config.target_modules = before["target_modules"]
            layers = [layer for layer in layers_of(model).values() if layer.is_plain_linear]
            for layer in layers:
                layer.is_last = layer is layers[-1]

    @property
    def _targets(self) -> list[str]:
        """The modules that the adapter being injected has deltas on."""
        return list(dict.fromkeys([*self._trained, *self._held]))

    def _check_wrappable(self, model: nn.Module, config: DeltaConfig) -> None:
        """Refuse what PEFT would wrap in part, or wrap so that nothing uses it."""
        layers = layers_of(model)
        for module_name in self._targets:
            *outer, _ = names = list(itertools.accumulate(module_name.split("."), "{}.{}".format))
            for name in names:
                if isinstance(module := model.get_submodule(name), AuxiliaryTrainingWrapper):
                    raise IsolateError(
                        f"{module_name!r} is trained by modules_to_save or trainable_token_indices of another "
                        "adapter: exclude it here"
                    )
            if isinstance(module, BaseTunerLayer) and not isinstance(module, DeltaLayer):
                raise IsolateError(
                    f"{module_name!r} is wrapped by {type(module).__name__} of another PEFT method: merge or unload "
                    "that adapter first, or exclude the module"
                )
            if isinstance(module, DeltaLayer) and module.prefix != self.prefix and module.scaling:
                raise IsolateError(
                    f"{module_name!r} has a delta of another method of this library, and PEFT saves an adapter by its "
                    "method's names: delete that adapter first, or exclude the module"
                )
            nested = [name for name in outer if name in self._targets or name in layers]
            nested += [name for name in layers if name.startswith(f"{module_name}.")]
            if nested:
                raise IsolateError(
                    f"{module_name!r} and {nested[0]!r} lie inside one another, and both have targeted parameters: "
                    "PEFT cannot wrap a module inside a wrapped one; exclude one of them"
                )
        beside = {name for name in layers if name.rpartition(".")[2] in saved_modules(config)}
        for name in beside.union(token_modules(model, config)):
            if name in layers:
                raise IsolateError(
                    f"{name!r} has a delta of another adapter, so modules_to_save and trainable_token_indices cannot "
                    "train it: leave it out of them"
                )

    def _prepare_adapter_config(self, peft_config: DeltaConfig, model_config: dict[str, Any]) -> DeltaConfig:
        return peft_config  # roles, not a table of model types, say what to target

    def _check_target_module_exists(self, peft_config: DeltaConfig, key: str) -> Any:
        if key in self._targets:
            return True
        return _ExcludedModule() if is_excluded(peft_config, key) else False

    def _create_and_replace(
        self,
        peft_config: DeltaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if current_key not in self._targets:
            raise RegionError(
                f"the state dict has deltas of {current_key!r}, which is not in the config's region: pass the config "
                "that was saved with it"
            )
        others = ((name, config) for name, config in self.peft_config.items() if name != adapter_name)
        if isinstance(target, DeltaLayer) and target.prefix != self.prefix:
            target = target.get_base_layer()  # of another method, whose adapters were deleted
        layer = target if isinstance(target, DeltaLayer) else DeltaLayer(target, self.prefix)
        layer.update_layer(
            adapter_name,
            self._trained.get(current_key, {}),
            self._held.get(current_key, {}),
            self._masks.get(current_key, {}),
            self._packings.get(current_key, {}),
            zero=peft_config.init_weights,
            inference_mode=peft_config.inference_mode,
            sibling=next((name for name, config in others if config is peft_config), None),
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)

    def _inject_parameters(
        self, peft_config: DeltaConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """`target_parameters` went into the region: their modules are wrapped already."""
        places = (*self._trained.items(), *self._held.items())
        names = dict.fromkeys(f"{module}.{name}" for module, of_module in places for name in of_module)
        return [name for name in names if is_targeted_parameter(peft_config, name)]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Nothing but the replacement: PEFT's own also assigns `.weight`, which not every wrapped module has."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Deltas are fp32 from the start, whoever injects them, and after a load; the base's dtype on request."""
        for layer in layers_of(self.model).values():
            for name in layer.parameter_names:
                base = getattr(layer.get_base_layer(), name)
                for delta in (d for adapter, d in layer.deltas(name).items() if adapter == adapter_name):
                    if autocast_adapter_dtype:
                        delta.cast(torch.promote_types(delta.dtype, torch.float32))
                    elif base.is_floating_point():
                        delta.cast(base.dtype)

    def train(self, mode: bool = True) -> DeltaTuner:
        """As every module's; but a training that can change nothing does not begin in silence.

        What `fuse` writes learns nothing until `next_stage`. To load it is no mistake, nor to load it as trainable;
        a trainer, which calls this, is made too early.
        """
        if mode and not any(parameter.requires_grad for parameter in self.model.parameters()):
            _warn_if_only_held(self.model, self.active_adapters)
        super().train(mode)
        return self

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> list[DeltaLayer]:
        """What could stop a merge half-way is looked at in every layer first; returns the layers."""
        for name in adapter_names or ():
            if name not in self.peft_config:
                raise IsolateError(f"there is no adapter {name!r} to merge: there are {list(self.peft_config)}")
        layers = layers_of(self.model)
        for name, layer in layers.items():
            layer.check_mergeable(name)
            if safe_merge:
                layer.check_finite(adapter_names, name)
        return list(layers.values())

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the adapters (the active ones by default) in every layer, or with `safe_merge` in none."""
        self._check_merge_allowed()
        # PEFT's loop also brings offloaded layers here, of which there are none left.
        for layer in self._check_merge(adapter_names, safe_merge):
            layer.merge(adapter_names=adapter_names)
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, DeltaLayer):  # the tokens that learn
                module.merge(adapter_names=adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        base: Any = super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)
        return base

    def unload(self) -> nn.Module:
        """The base model, bit for bit, also where adapters are merged."""
        for layer in layers_of(self.model).values():
            if layer.merged:
                layer.unmerge()
        return super().unload()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, let every layer agree on which one is then.

        PEFT lets each layer choose among the adapters it happens to have; two halves of a model have different ones.
        """
        active = list(self.active_adapters)
        learning = any(
            parameter.requires_grad for layer in layers_of(self.model).values() for parameter in layer.parameters()
        )
        super().delete_adapter(adapter_name)
        if adapter_name in active:
            active.remove(adapter_name)
            if others := active or list(self.peft_config)[:1]:
                self.set_adapter(others, inference_mode=not learning)
        else:
            self.active_adapter = active

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter that is `Σ weight · α · Δ` of others, on the union of their supports.

        Args:
            adapters: Their names.
            weights: One for each.
            adapter_name: The new one, which is not made active.
            combination_type: Only "linear".

        Raises:
            IsolateError: See the message; nothing was added.
        """
        if combination_type != "linear":
            raise IsolateError(
                f"combination_type={combination_type!r}: deltas of this kind are combined 'linear'ly over the union "
                "of their supports; the other kinds are for low-rank factors"
            )
        add_weighted(self, adapters, weights, adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Where PEFT would let LoRA choose an adapter for each row of a batch."""
        if kwargs.get("adapter_names") is not None:
            raise IsolateError(
                f"adapter_names={kwargs['adapter_names']!r}: one batch cannot mix adapters of this method; use "
                "set_adapter and one batch for each"
            )
        yield

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP asks a module for when it wraps it: buffers that it shall not send around in each forward.

        Positions never change in training, and being written to would have them decoded again. DDP sends no region at
        all then, so the processes compare theirs here, before they train.
        """
        deltas = dict(self._deltas())
        check_same_everywhere(deltas)
        return [f"base_model.model.{name}.{key}" for name, delta in deltas.items() for key in delta.state]

    def _deltas(self) -> Iterator[tuple[str, Delta]]:
        return ((name, module) for name, module in self.model.named_modules() if isinstance(module, Delta))

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: DeltaConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        saved = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # PEFT looks for modules' names, and finds nothing where FSDP's activation checkpointing has changed them.
        for name, delta in deltas_of(model, adapter_name).items():
            keys = (f"{name}.{tensor}" for tensor in (*delta.places, *delta.state))
            saved |= {key: state_dict[key] for key in keys if key in state_dict}
        # Where `target_modules` names an embedding or the head, PEFT goes on to save its base weight from this dict.
        for key in [key for key in state_dict if ".base_layer." in key]:
            del state_dict[key]
        saved = to_save(model, config, adapter_name, saved)
        remember(model, config, adapter_name, saved)
        return saved

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DeltaConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's mapping of the file's names to the model's; refuses what stock loading would skip in silence."""
        if any(adapter_name in layer.merged_adapters for layer in layers_of(model).values()):
            raise IsolateError(f"the adapter {adapter_name!r} is merged: unmerge_adapter() before loading into it")
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        try:
            check_loaded(model, adapter_name, cls.prefix, mapped)
        except IsolateError:
            if config.awaits_file:
                _take_back(model, adapter_name)
            raise
        config.forget_tensors()
        config.awaits_file = False
        return mapped


def _take_back(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter that was made for a file which turned out damaged; it has no numbers yet."""
    if not isinstance(getattr(model, "base_model", None), DeltaTuner):
        return
    if len(model.peft_config) > 1:  # type: ignore[arg-type]
        model.delete_adapter(adapter_name)  # type: ignore[operator]
    else:
        model.base_model.unload()  # type: ignore[operator, union-attr]  # nobody has the PeftModel yet, only its base


def _by_module(of_name: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{module: {its parameter: …}} of {parameter: …}."""
    found: dict[str, dict[str, Any]] = {}
    for full_name, value in of_name.items():
        module, _, parameter = full_name.rpartition(".")
        found.setdefault(module, {})[parameter] = value
    return found


def _warn_if_only_held(model: nn.Module, active: list[str]) -> None:
    """Where the active adapters have no number that could learn."""
    deltas = [delta for name in active for delta in deltas_of(model, name).values()]
    if deltas and not any(TRAINED in delta.places for delta in deltas):
        warnings.warn(
            f"nothing learns in this training: all that the adapter {', '.join(map(repr, active))} has is held, as "
            "fuse() leaves it; begin a stage by next_stage(model, frozen=…), and make the trainer after that",
            UserWarning,
            stacklevel=4,  # whoever calls train() of the PeftModel, which calls the tuner's
        )


def _warn_if_large(region: Region, model: nn.Module, config: DeltaConfig) -> None:
    """One warning where the saved adapter takes more than half the bytes of the base."""
    dtype = config.saved_torch_dtype or torch.float32  # PEFT's autocast trains fp32, whatever the base has
    share = dtype.itemsize * region.count / base_bytes(model)
    if share > 0.5:
        advice = "" if dtype.itemsize == 2 else "save_dtype='bfloat16' halves it, and "
        warnings.warn(
            f"the adapter will take {share:.0%} of its base's bytes: {advice}a merged model may be better to share",
            UserWarning,
            stacklevel=2,
        )


def _warn_of_a_new_head(region: Region, model: nn.Module, config: DeltaConfig) -> None:
    """A classifier's head is new and random; PEFT trains and saves it only where it is told the task."""
    beside = trained_beside(model, config)
    for role in roles(model):
        new = role.name == "head" and role.module.rpartition(".")[2] in NEW_HEADS and role.parameter not in region
        if new and role.module not in beside:
            warnings.warn(
                f"the head {role.module!r} stays as it is and is not saved: if it is new, pass task_type='SEQ_CLS' "
                f"(or 'TOKEN_CLS') or modules_to_save=[{role.module!r}] in the config",
                UserWarning,
                stacklevel=2,
            )
            return
