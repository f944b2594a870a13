"""PEFT's contract, kept once for all methods: a method brings a config, this brings the rest."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import nn

from ..regions.region import Region, base_parameters
from ..regions.selection import Selection
from .config import DeltaConfig
from .layer import DeltaLayer
from .targets import is_excluded

logger = logging.getLogger(__name__)


class DeltaTuner(BaseTuner):
    """Injects a `DeltaLayer` wherever the config's region touches a module. Subclasses set `prefix`."""

    tuner_layer_cls = DeltaLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # declared like this by PEFT

    def _prepare_adapter_config(self, peft_config: DeltaConfig, model_config: dict[str, Any]) -> DeltaConfig:
        return peft_config  # roles, not a table of model types, say what to target

    def _prepare_model(self, peft_config: DeltaConfig, model: nn.Module) -> None:
        """Choose the region, or check the recorded one, before anything of the model is touched."""
        region = peft_config.resolve(model)
        if peft_config.resolved is None:
            peft_config.record(region)
            assert peft_config.resolved is not None
            chosen_by = ", ".join(f"{name}={value!r}" for name, value in peft_config.resolved["chosen_by"].items())
            logger.info("%s(%s) chose %r", type(peft_config).__name__, chosen_by, region)
            _warn_if_large(region, model)
        self._selections: dict[str, dict[str, Selection]] = {}
        for name, selection in region.items():
            module_name, _, parameter_name = name.rpartition(".")
            self._selections.setdefault(module_name, {})[parameter_name] = selection

    def _check_target_module_exists(self, peft_config: DeltaConfig, key: str) -> Any:
        if key in self._selections:
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
        layer = target if isinstance(target, DeltaLayer) else DeltaLayer(target, self.prefix)
        layer.update_layer(
            adapter_name,
            self._selections[current_key],
            zero=peft_config.init_weights,
            inference_mode=peft_config.inference_mode,
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)

    def _inject_parameters(
        self, peft_config: DeltaConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """`target_parameters` went into the region: their modules are wrapped already."""
        return [f"{module}.{name}" for module, selections in self._selections.items() for name in selections]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Nothing but the replacement: PEFT's own also assigns `.weight`, which not every wrapped module has."""
        setattr(parent, child_name, new_module)

    def unload(self) -> nn.Module:
        """The base model, bit for bit, also where adapters are merged."""
        for module in self.model.modules():
            if isinstance(module, DeltaLayer) and module.merged:
                module.unmerge()
        return super().unload()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and let every layer agree on which is active then.

        PEFT lets each layer choose among the adapters it happens to have; two halves of a model have different ones.
        """
        active = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        self.set_adapter(active or list(self.peft_config)[:1])

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
        dtype = config.saved_torch_dtype
        if dtype is None:
            return saved
        rounded = {key: value.to(dtype) if value.is_floating_point() else value for key, value in saved.items()}
        errors = [(saved[key] - rounded[key]).abs().max().item() for key in saved if saved[key].numel()]
        logger.warning(
            "the adapter %r is saved in %s: its deltas are rounded by at most %.3g", adapter_name, config.save_dtype,
            max(errors, default=0.0),
        )  # fmt: skip
        return rounded


def _warn_if_large(region: Region, model: nn.Module) -> None:
    """One warning where the saved adapter, fp32 as PEFT trains it, takes more than half the bytes of the base."""
    base = sum(parameter.numel() * parameter.element_size() for parameter in base_parameters(model).values())
    adapter = 4 * region.count
    if 2 * adapter > base:
        warnings.warn(
            f"the adapter will take {adapter / 1e9:.2g} GB in fp32, {adapter / base:.0%} of its base's "
            f"{base / 1e9:.2g} GB: save_dtype='bfloat16' halves it, and a merged model may be better to share",
            UserWarning,
            stacklevel=2,
        )
