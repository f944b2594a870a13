"""What docs/interop.md says of other programs, as far as it can be tried without them."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_isolate import CoFiTuneConfig, HalfFTConfig, plan
from tests.models import tiny, tokens


def step(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of everything that learns."""
    model.zero_grad()
    out = model(input_ids=tokens(), labels=tokens())
    out.loss.backward()
    return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rms_norm(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * wide.to(hidden.dtype)


def feed_forward(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return self.down_proj(torch.nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def patch_as_liger_does(model: torch.nn.Module) -> None:
    """Put a `forward` into each norm and feed-forward that is there, wrapped or not, which reads `self.weight`."""
    norms = [model.norm]
    for layer in model.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        layer.mlp.__dict__["forward"] = MethodType(feed_forward, layer.mlp)
    for norm in norms:
        norm.__dict__["forward"] = MethodType(rms_norm, norm)


def test_methods_that_are_replaced_from_outside_compute_with_the_deltas():
    """Liger Kernel's way: the same logits and gradients, with the adapter on, off, and merged."""
    base, model = tiny(), get_peft_model(tiny(), HalfFTConfig(init_weights=False))
    logits, gradients = step(model)
    assert any("norm" in name for name in gradients)
    patch_as_liger_does(model.get_base_model().model)
    patched, patched_gradients = step(model)
    assert torch.equal(patched, logits)
    assert patched_gradients.keys() == gradients.keys()
    assert all(torch.equal(patched_gradients[name], gradients[name]) for name in gradients)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(input_ids=tokens()).logits, base(input_ids=tokens()).logits)
        model.merge_adapter()
        assert torch.equal(model(input_ids=tokens()).logits, logits)


@pytest.mark.parametrize("config", [HalfFTConfig(), CoFiTuneConfig()], ids=["half_ft", "cofitune"])
def test_an_adapter_made_beforehand_trains_where_a_program_only_loads_adapters(config, tmp_path):
    """Axolotl's and LLaMA-Factory's way: `PeftModel.from_pretrained(model, folder, is_trainable=True)`."""
    fresh = get_peft_model(tiny(), config)
    fresh.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny(), str(tmp_path), is_trainable=True)
    assert plan(model, model.peft_config["default"]).region == plan(fresh, fresh.peft_config["default"]).region
    _, gradients = step(model)
    assert gradients.keys() == {name for name, p in fresh.named_parameters() if p.requires_grad}
