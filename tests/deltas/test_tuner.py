"""PEFT's contract: what a PEFT user reaches for, on real models."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType
from safetensors.torch import load_file
from torch import nn

from peft_isolate import HalfFTConfig, next_round, plan
from peft_isolate._register import register
from peft_isolate.deltas import DeltaLayer
from peft_isolate.deltas.adapters import layers_of
from peft_isolate.errors import FormatError, IsolateError, RegionError
from peft_isolate.methods.half_ft import HalfFTTuner
from tests.compare import logits
from tests.models import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take")


def randomized(model: PeftModel, seed: int = 0) -> PeftModel:
    """Random deltas in place of zeros, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "halfft_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def two_rounds(dtype: torch.dtype = torch.float32) -> tuple[PeftModel, torch.Tensor]:
    """A model with the adapters "a" (round 0) and "b" (round 1), and the base's logits."""
    base = tiny(dtype=dtype)
    expected = logits(base)
    model = get_peft_model(base, HalfFTConfig(), adapter_name="a")
    model.add_adapter("b", HalfFTConfig(round_index=1))
    return randomized(model), expected


def test_register_is_idempotent_and_a_real_member():
    """By name, by value, in iteration, in JSON; a clash with another's method is not swallowed."""
    for _ in range(2):
        register("HALFFT", HalfFTConfig, HalfFTTuner)
    assert PeftType("HALFFT") is PeftType.HALFFT
    assert list(PeftType).count("HALFFT") == 1
    assert isinstance(PeftType.HALFFT, PeftType)
    assert copy.deepcopy(PeftType.HALFFT) is PeftType.HALFFT
    assert json.dumps(PeftType.HALFFT) == '"HALFFT"'
    with pytest.raises(KeyError, match="lora"):
        register("LORA", HalfFTConfig, HalfFTTuner)


def test_switch_several_active_and_delete():
    model, base = two_rounds()
    a = logits(model)
    model.set_adapter("b")
    b = logits(model)
    assert not torch.equal(a, b)
    model.base_model.set_adapter(["a", "b"])
    both = logits(model)
    assert not torch.equal(both, a)
    assert not torch.equal(both, b)
    model.base_model.set_adapter(["b", "a"])
    assert torch.equal(logits(model), both)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.set_adapter("a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says which adapter becomes active, layer by layer
        model.delete_adapter("a")
    # The two halves live in different layers: all must agree that "b" is active now.
    assert torch.equal(logits(model), b)
    assert model.active_adapters == ["b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_unmerge_unload(dtype):
    """Promise 2 through PEFT's own methods, two adapters merged together and one after the other."""
    model, base = two_rounds(dtype)
    base_state = {n: p.clone() for n, p in model.get_base_model().named_parameters() if "halfft_" not in n}
    model.base_model.set_adapter(["a", "b"])
    both = logits(model)
    for _ in range(3):
        model.merge_adapter(["a"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of every layer that the second adapter is merged onto
            model.merge_adapter(["b"], safe_merge=True)
        assert torch.equal(logits(model), both)
        model.unmerge_adapter()
        assert torch.equal(logits(model), both)
    state = {n: p for n, p in model.get_base_model().named_parameters() if "halfft_" not in n}
    assert all(torch.equal(state[n], base_state[n]) for n in base_state)

    merged = copy.deepcopy(model).merge_and_unload()
    assert not any(isinstance(module, DeltaLayer) for module in merged.modules())
    assert torch.equal(logits(merged), both)
    model.merge_adapter()
    assert torch.equal(logits(model.unload()), base)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, dtype, low_cpu_mem_usage):
    """Same logits; the file holds the region's scalars and nothing else; the draw is read, not redrawn."""
    base = tiny(dtype=dtype)
    model = randomized(get_peft_model(copy.deepcopy(base), HalfFTConfig(seed=3)))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    region = plan(base, HalfFTConfig(seed=3)).region
    assert sum(tensor.numel() for tensor in saved.values()) == region.count
    assert len(saved) == len(region)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["plugin"] == "peft_isolate"
    assert set(config["resolved"]["region"]) == set(region)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == region.count
    again.load_adapter(tmp_path, adapter_name="second", low_cpu_mem_usage=low_cpu_mem_usage)
    again.set_adapter("second")
    assert torch.equal(logits(again), expected)
    assert PeftConfig.from_pretrained(tmp_path).resolved == config["resolved"]


def test_save_dtype_halves_the_file_and_says_what_it_rounds(tmp_path, caplog):
    model = randomized(get_peft_model(tiny(), HalfFTConfig(save_dtype="bfloat16")))
    with caplog.at_level("WARNING", "peft_isolate"):
        model.save_pretrained(tmp_path)
    assert "saved in bfloat16: its deltas are rounded by at most" in caplog.text
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert {p.dtype for n, p in loaded.named_parameters() if "halfft_" in n} == {torch.float32}
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0.05)


def test_deltas_are_fp32_by_default_and_of_the_base_dtype_on_request():
    def dtypes(**kwargs):
        model = get_peft_model(tiny(dtype=torch.bfloat16), HalfFTConfig(), **kwargs)
        return {p.dtype for n, p in model.named_parameters() if "halfft_" in n}

    assert dtypes() == {torch.float32}
    assert dtypes(autocast_adapter_dtype=False) == {torch.bfloat16}


def test_a_sibling_from_the_same_config_object_has_the_same_region():
    """What TRL does for its "ref": the same config object under another name, then a copy of the parameters."""
    config = HalfFTConfig()
    model = randomized(get_peft_model(tiny(), config))
    model.add_adapter("ref", config)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    expected = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


def test_only_deltas_of_the_active_adapter_learn():
    model, _ = two_rounds()
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert learning
        assert all(f".{adapter}." in name for name in learning)


def test_modules_to_save_and_new_tokens_are_pefts_own(tmp_path):
    """They train and are saved as with any PEFT method, beside the region; plan says what they cost."""
    config = HalfFTConfig(modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [5, 6]})
    table = plan(tiny(), config)
    assert table.outside_bytes == 64 * 32 * 4 + 2 * 32 * 4
    assert "by modules_to_save and trainable_token_indices" in str(table)
    model = get_peft_model(tiny(), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any("lm_head" in key for key in keys)
    assert any("embed_tokens" in key for key in keys)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path)), expected)


def test_exclude_modules_is_subtracted_last():
    whole = plan(tiny(), HalfFTConfig()).region
    less = plan(tiny(), HalfFTConfig(exclude_modules=["mlp.down_proj", "q_proj"])).region
    assert less == type(whole)({n: s for n, s in whole.items() if "down_proj" not in n and "q_proj" not in n})
    model = get_peft_model(tiny(), HalfFTConfig(exclude_modules=["mlp.down_proj", "q_proj"]))
    assert not any("q_proj.halfft_" in name for name, _ in model.named_parameters())


def test_any_module_by_target_modules():
    """Roles unknown: the user names the pool, and half of it is drawn."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x)).T).T) * self.scale

    with pytest.raises(RegionError, match=r"no attention.*was recognised in Net.*target_modules"):
        get_peft_model(Net(), HalfFTConfig())
    model = get_peft_model(Net(), HalfFTConfig(target_modules=["a", "b", "c", "d"]))
    assert sum(isinstance(module, DeltaLayer) for module in model.modules()) == 2
    assert len(plan(Net(), HalfFTConfig(target_modules="all-linear", fraction=1.0)).region) == 6
    assert list(plan(Net(), HalfFTConfig(target_parameters=["c.weight"])).region) == ["c.weight"]
    model = get_peft_model(Net(), HalfFTConfig(target_parameters=["c.weight"]))
    model(torch.randn(3, 4)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "base_model.model.c.halfft_weight.default.delta"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, r"bias='all' would train biases of the base in place.*train_bias"),
        ({"save_dtype": "int4"}, r"save_dtype='int4' is unknown.*bfloat16"),
        ({"fraction": 0.0}, r"fraction=0\.0 is no share"),
        ({"fraction": 1.5}, r"fraction=1\.5 is no share"),
        ({"granularity": "row"}, r"granularity='row' is unknown.*category"),
        ({"balance": "size"}, r"balance='size' is unknown.*parameters"),
        ({"train_embeddings": "output"}, r"train_embeddings='output' is unknown.*'input'"),
        ({"train_embeddings": True, "target_modules": ["q_proj"]}, r"no effect where target_modules or"),
        ({"round_index": -1}, r"round_index=-1 must be a whole number"),
        ({"seed": 0.5}, r"seed=0\.5 must be a whole number"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, r"cannot be used with the pattern"),
        ({"fraction": "0.5"}, r"fraction='0\.5' is no share"),
        ({"seed": True}, r"seed=True must be a whole number"),
        ({"layers_pattern": "layers"}, r"layers_to_transform is not set"),
        ({"train_bias": "no"}, r"train_bias='no': use True or False"),
        ({"init_weights": None}, r"init_weights=None: use True or False"),
        ({"train_embeddings": 1}, r"train_embeddings=1 is unknown.*'input'"),
        ({"target_modules": "(q"}, r"target_modules='\(q' is no regular expression \(missing \).*backslash"),
        ({"exclude_modules": "["}, r"exclude_modules='\[' is no regular expression"),
        ({"modules_to_save": ["score", "*"]}, r"modules_to_save='\*' is no regular expression"),
    ],
)
def test_a_mistake_in_the_config_gets_value_reason_and_remedy(change, message):
    with pytest.raises(IsolateError, match=message):
        HalfFTConfig(**change)


@pytest.mark.parametrize("name", ["a.b", ""])
def test_a_name_that_torch_does_not_take_is_refused(name):
    with pytest.raises(IsolateError, match=r"is empty or has a dot.*choose another, such as 'default'"):
        get_peft_model(tiny(), HalfFTConfig(), adapter_name=name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["nothing"]}, r"selects nothing of LlamaForCausalLM.*'nothing'"),
        ({"layers_to_transform": [99]}, r"no layer \[99\] in this model, which has 3 \(0 to 2\)"),
        ({"exclude_modules": ".*"}, r"selects nothing of LlamaForCausalLM"),
    ],
)
def test_a_config_that_matches_nothing_changes_nothing(config, message):
    model = tiny()
    with pytest.raises(RegionError, match=message):
        get_peft_model(model, HalfFTConfig(**config))
    assert not any(isinstance(module, DeltaLayer) for module in model.modules())


def test_a_resolved_config_is_used_as_it_is_or_refused():
    """Another model, a changed field, an altered record: each an error that says what to do."""
    config = HalfFTConfig()
    get_peft_model(tiny(), config)
    assert plan(tiny(), config).region == plan(tiny(), HalfFTConfig()).region
    with pytest.raises(RegionError, match=r"made for another model"):
        get_peft_model(tiny("opt"), config)
    with pytest.raises(RegionError, match=r"(?s)shape \(16, 32\) in the region and \(32, 64\) in this model"):
        get_peft_model(tiny(hidden_size=64, intermediate_size=96), config)
    changed = copy.deepcopy(config)
    changed.round_index = 1
    with pytest.raises(RegionError, match=r"round_index is 1.*chosen with 0.*resolved=None"):
        get_peft_model(tiny(), changed)
    altered = copy.deepcopy(config)
    next(iter(altered.resolved["region"].values()))["kind"] = "diagonal"
    with pytest.raises(FormatError, match="describes no selection"):
        get_peft_model(tiny(), altered)


def test_tied_embeddings_are_refused_clearly():
    with pytest.raises(
        RegionError, match=r"embed_tokens.weight' is tied to \['lm_head.weight'\].*tie_word_embeddings"
    ):
        get_peft_model(tiny("gemma2"), HalfFTConfig(train_embeddings="input"))


def test_a_large_adapter_is_announced_once():
    with pytest.warns(UserWarning, match=r"the adapter will take .* of its base's") as caught:
        get_peft_model(tiny(dtype=torch.bfloat16), HalfFTConfig())
    assert sum("the adapter will take" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny(), HalfFTConfig())


def test_init_weights_false_is_random_as_in_peft():
    base = logits(tiny())
    assert not torch.equal(logits(get_peft_model(tiny(), HalfFTConfig(init_weights=False))), base)


def test_set_scale_reaches_every_layer():
    model, base = two_rounds()
    for module in model.modules():
        if isinstance(module, DeltaLayer):
            module.set_scale("a", 0.0)
    assert torch.equal(logits(model), base)


def test_without_the_plugin_the_config_names_it(tmp_path):
    """A process that never imported us cannot load the adapter; its config says what to import."""
    get_peft_model(tiny(), HalfFTConfig()).save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "KeyError: 'HALFFT'" in alone.stderr
    with_it = subprocess.run([sys.executable, "-c", f"import peft_isolate; {code}"], capture_output=True, text=True)
    assert with_it.returncode == 0, with_it.stderr


@pytest.mark.parametrize("state", ["no grad", "loaded for inference", "second round", "held only"])
def test_compiles_to_one_graph_whatever_learns(state, tmp_path):
    model = randomized(get_peft_model(tiny(), HalfFTConfig()))
    if state == "loaded for inference":
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(tiny(), tmp_path)
    elif state == "second round":
        next_round(model)
        randomized(model)
    elif state == "held only":
        model.requires_grad_(False)
        next_round(model)
    torch._dynamo.reset()
    with torch.no_grad() if state == "no grad" else contextlib.nullcontext():
        expected = model(input_ids=tokens(), use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=tokens(), use_cache=False).logits, expected)


def test_what_the_compiler_is_told_of_a_layer_is_true():
    """Strides included: inductor relies on them, and a layer may read a transposed tensor (Mamba's x_proj does)."""
    model = randomized(get_peft_model(tiny(num_hidden_layers=1), HalfFTConfig(fraction=1.0)))
    layer = next(layer for name, layer in layers_of(model).items() if name.endswith("up_proj"))
    x = torch.randn(2, 32, 5).transpose(1, 2)
    layer.requires_grad_(False)  # the operator is a backward, and has none
    terms = layer._terms("weight", ["default"])
    fields = (terms.deltas, terms.scales, terms.flat_supports(), terms.indices, terms.factors, terms.damped)
    w0 = layer.base_parameter("weight")
    needs = [True] * len(terms.deltas)
    torch.library.opcheck(
        torch.ops.peft_isolate.linear_backward,
        (torch.randn(2, 5, 48), x, w0, *fields, terms.disjoint, False, True, needs),
    )
    torch.library.opcheck(torch.ops.peft_isolate.compose, (w0, *fields, terms.disjoint))


@pytest.mark.parametrize("architecture", ["llama", pytest.param("phi3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(architecture, backend):
    """`fullgraph=True`, forward and backward; the gradients are those of eager."""
    model = randomized(get_peft_model(tiny(architecture), HalfFTConfig()))

    def gradients(run):
        model.zero_grad()
        run(input_ids=tokens(), use_cache=False).logits.log_softmax(-1)[..., 3].mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    torch._dynamo.reset()
    eager = gradients(model)
    compiled = gradients(torch.compile(model, fullgraph=True, backend=backend))
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)
