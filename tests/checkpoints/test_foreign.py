"""Adapters of PEFT's own methods as differences: what merging them adds, in full precision, live and from a folder."""

from __future__ import annotations

import json

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn

from peft_isolate.checkpoints.difference import difference_of
from peft_isolate.errors import FormatError, IsolateError, RegionError
from peft_isolate.regions import base_parameters
from tests.checkpoints.folders import load, saved
from tests.checkpoints.tunings import UP, by_hand, lora
from tests.compare import assert_same, logits
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


def merged_in_float64(base: nn.Module, folder) -> nn.Module:
    model = PeftModel.from_pretrained(base.double(), folder, autocast_adapter_dtype=False)
    return model.double().merge_and_unload()


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}, {"experts": True}],
    ids=["plain", "dora", "rslora", "experts"],
)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral"])
def test_lora_live_and_from_a_folder(architecture, fields, tmp_path):
    """The merged Δ in full precision, over a bf16 base whose dtype would round it; asking changes nothing."""
    if fields.get("experts"):
        if architecture != "mixtral":
            pytest.skip("has no experts")
        fields = {"target_parameters": ["gate_up_proj", "down_proj"]}
    base = saved(tmp_path / "base", architecture, torch.bfloat16, max_shard_size="20KB")
    model = get_peft_model(load(base, architecture), lora(architecture, **fields))
    model.save_pretrained(tmp_path / "lora")
    before = logits(model)
    # Only B·A is common to both: a live DoRA's magnitude was made in the base's dtype and is saved as it is.
    wanted = by_hand(load(base, architecture), merged_in_float64(load(base, architecture), tmp_path / "lora"))
    for bases, other in ((base, model), (base, tmp_path / "lora"), (load(base, architecture), tmp_path / "lora")):
        found = difference_of(bases, other)
        assert set(found.touched) >= {name for name, delta in wanted.items() if delta.any()} != set()
        assert set(found.touched) < set(found)
        for name, delta in found.items():
            assert delta.dtype == torch.float32
            assert torch.equal(delta, wanted[name].float()), name
    assert torch.equal(logits(model), before)
    assert_same(dict(base_parameters(model)), dict(base_parameters(load(base, architecture))))


def test_lora_is_b_times_a(tmp_path):
    """By the definition."""
    base = tiny()
    model = get_peft_model(tiny(), lora("llama", lora_alpha=12))
    found = difference_of(base, model)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    assert torch.allclose(found[UP], (b.double() @ a.double() * 3).float(), rtol=1e-6, atol=1e-12)
    assert found.touched == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"], init_ia3_weights=False),
        LoHaConfig(r=4, target_modules=["up_proj"], init_weights=False),
        LoKrConfig(r=4, target_modules=["up_proj"], init_weights=False),
        OFTConfig(r=0, oft_block_size=8, target_modules=["up_proj"], init_weights=False),
        VeraConfig(r=4, target_modules=["up_proj"], init_weights=False),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_of_peft(config, tmp_path):
    """Those that multiply W0, and those whose get_delta_weight is no Δ, give what merging them gives."""
    base = saved(tmp_path / "base")
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    wanted = by_hand(load(base), PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload())
    assert wanted[UP].any()
    for other in (model, tmp_path / "adapter"):
        found = difference_of(base, other)
        for name in found:
            assert torch.allclose(found[name].double(), wanted[name], atol=1e-6), name


def test_several_loras_at_once(tmp_path):
    """The active ones are summed, the others are not."""
    base, model = tiny(), get_peft_model(tiny(), lora("llama"))
    model.add_adapter("second", lora("llama", target_modules=["up_proj", "q_proj"]))
    one = difference_of(base, model)[UP]
    model.base_model.set_adapter("second")
    two = difference_of(base, model)[UP]
    model.base_model.set_adapter(["default", "second"])
    assert torch.allclose(difference_of(base, model)[UP], one + two, atol=1e-7)
    assert one.any()
    assert not torch.equal(one, two)


def test_adapters_on_tied_tensors(tmp_path):
    """A delta on one of the names would be missed under the other."""
    base = saved(tmp_path / "base", "gemma2")
    for module in ("embed_tokens", "lm_head"):
        model = get_peft_model(load(base, "gemma2"), lora(target_modules=[module, "up_proj"]))
        model.save_pretrained(tmp_path / module, save_embedding_layers=False)
        model.save_pretrained(tmp_path / f"{module}2", save_embedding_layers=True)
        for other in (model, tmp_path / module, tmp_path / f"{module}2"):
            with pytest.raises(RegionError, match=f"changes '.*{module}.weight', and .* is tied to"):
                difference_of(base, other)


@pytest.mark.parametrize("include", [True, False])
def test_embeddings_and_heads_with_a_lora(include, tmp_path):
    """PEFT writes the weights along that it adds to: the base's own are no obstacle, in another dtype neither."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    for targets in (["embed_tokens", "up_proj"], ["lm_head", "up_proj"], ["embed_tokens", "lm_head"]):
        for loaded in (load(base), load(base).float()):
            model = get_peft_model(loaded, lora(target_modules=targets))
            folder = tmp_path / f"{targets}{next(loaded.parameters()).dtype}"
            model.save_pretrained(folder, save_embedding_layers=include)
            keys = load_file(folder / "adapter_model.safetensors")
            assert any(f"{targets[0]}.base_layer.weight" in key for key in keys) == include
            found = difference_of(base, folder)
            wanted = difference_of(base, model) if loaded.dtype == torch.bfloat16 else None
            assert any(targets[0] in name for name in found.touched)
            if wanted is not None:
                assert found.touched == wanted.touched
                assert_same(dict(found), dict(wanted))
    wide = saved(tmp_path / "wide", dtype=torch.float32)
    model = get_peft_model(load(wide).bfloat16(), lora(target_modules=["embed_tokens"]))
    model.save_pretrained(tmp_path / "narrow", save_embedding_layers=include)
    assert difference_of(wide, tmp_path / "narrow").touched == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_embeddings_of_another_base(module, tmp_path):
    """Where what was written along is not the base's, it is a base weight that the adapter carries."""
    base = saved(tmp_path / "base")
    model = get_peft_model(load(base), lora(target_modules=[module, "up_proj"]))
    with torch.no_grad():
        base_parameters(model)[f"model.{module}.weight" if module == "embed_tokens" else "lm_head.weight"][3, 4] += 1.0
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(RegionError, match=rf"carries the base weight '.*{module}\.weight' whole, with other numbers"):
        difference_of(base, tmp_path / "lora")


def test_adapters_that_give_no_difference(tmp_path):
    """Prompts change no weights; PiSSA moves W0; a state dict has no modules to put a LoRA into."""
    base = saved(tmp_path / "base")
    prompt = get_peft_model(load(base), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    prompt.save_pretrained(tmp_path / "prompt")
    for other in (prompt, tmp_path / "prompt"):
        with pytest.raises(IsolateError, match=r"change.? no weights"):
            difference_of(base, other)
    get_peft_model(load(base), lora("llama", init_lora_weights="pissa")).save_pretrained(tmp_path / "pissa")
    with pytest.raises(IsolateError, match="init_lora_weights='pissa', which takes a part of the base"):
        difference_of(base, tmp_path / "pissa")
    model = get_peft_model(load(base), lora("llama"))
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(IsolateError, match="not one: pass the base's folder"):
        difference_of(load(base).state_dict(), tmp_path / "lora")
    with pytest.raises(IsolateError, match="wrapped already: pass the base's folder"):
        difference_of(model, tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(IsolateError, match="other formats are not read"):
        difference_of(base, tmp_path / "lora")


def test_a_lora_file_that_is_not_its_configs(tmp_path):
    """Missing, surplus, resized and damaged tensors are named, not passed over."""
    base = saved(tmp_path / "base")
    folder = tmp_path / "lora"
    get_peft_model(load(base), lora("llama")).save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    sound = load_file(path)
    first = sorted(sound)[0]

    def write(tensors) -> None:
        save_file(tensors, path, metadata={"format": "pt"})

    write({name: tensor for name, tensor in sound.items() if name != first})
    with pytest.raises((RegionError, IsolateError), match="lora_A"):
        difference_of(base, folder)
    write(sound | {first.replace("layers.0", "layers.7"): sound[first].clone()})
    with pytest.raises(RegionError, match=r"layers\.7.* is only in the file"):
        difference_of(base, folder)
    write(sound | {first: torch.ones(2, 2)})
    with pytest.raises(RegionError, match="does not go onto"):
        difference_of(base, folder)
    write(sound | {first: torch.full_like(sound[first], torch.nan)})
    with pytest.raises(IsolateError, match="not finite there"):
        difference_of(base, folder)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FormatError):
        difference_of(base, folder)
    write(sound)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "NOTHING"}))
    with pytest.raises(FormatError):
        difference_of(base, folder)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 10**9}))
    with pytest.raises(FormatError, match="claims rank 1,000,000,000"):
        difference_of(base, folder)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_fc"]}))
    with pytest.raises(RegionError, match="does not go onto"):
        difference_of(base, folder)
