"""The side path: quantised, offloaded and sharded bases, what it may do with them and how exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.pytorch_utils import Conv1D

from peft_isolate import HalfFTConfig, plan
from peft_isolate.deltas import DeltaLayer
from peft_isolate.deltas.beside import can_stand_beside
from peft_isolate.errors import BaseMismatchError, IsolateError, RegionError
from peft_isolate.regions import Selection, roles
from peft_isolate.regions.region import base_bytes, is_plain, logical_shape
from peft_isolate.regions.selection import KINDS
from tests.compare import logits
from tests.given import GivenConfig
from tests.models import DEVICE, tiny, tokens

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the quantised models here are made on the CPU")

QUANTISED = ("4bit", "8bit", "int8")
BASES = (*QUANTISED, "offloaded")
# Blocks of 64 are what bitsandbytes quantises.
WIDE = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "num_hidden_layers": 2},
    "gpt2": {"n_embd": 64, "n_layer": 2},
}
CONFIGS: dict[str, Callable[[], HalfFTConfig | GivenConfig]] = {
    "half": lambda: HalfFTConfig(seed=1),
    **{kind: lambda kind=kind: GivenConfig(kind=kind) for kind in KINDS},
}


def quantisation(kind: str):
    if kind == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_use_double_quant=True
        )
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The plain models, saved: quantising is a way of loading."""
    path = tmp_path_factory.mktemp("models")
    for architecture, sizes in WIDE.items():
        tiny(architecture, **sizes).save_pretrained(path / architecture)
    tiny(seed=1, **WIDE["llama"]).save_pretrained(path / "another")
    return path


@pytest.fixture
def make(folder):
    """`make(kind, name)`: a fresh base."""

    def load(kind: str, name: str = "llama"):
        if kind == "offloaded":
            model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
            cpu_offload(model, execution_device="cpu")
            return model
        pytest.importorskip("torchao" if kind == "int8" else "bitsandbytes")
        config = quantisation(kind)
        model = AutoModelForCausalLM.from_pretrained(
            folder / name, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
        )
        for module in model.modules():
            # On some processors bitsandbytes repacks its weights for inference, and back, with other numbers.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model.eval()

    return load


def dequantised(model: nn.Module, plain: nn.Module) -> nn.Module:
    """A plain model with the numbers that the quantised one stands for."""
    own = dict(model.named_modules())
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear) and not is_plain(weight := own[name].weight, own[name]):
                module.weight.copy_(numbers(own[name], weight))
    return plain


def numbers(module: nn.Module, weight) -> torch.Tensor:
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if weight.dtype == torch.int8:
        return weight.data * weight.SCB[:, None] / 127
    return weight.dequantize()


def randomized(model: nn.Module, std: float = 0.05) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "halfft_" in name or "given_" in name:
                parameter.normal_(std=std)
    return model.eval()


def layers(model: nn.Module) -> list[DeltaLayer]:
    return [module for module in model.modules() if isinstance(module, DeltaLayer)]


def set_scale(model: nn.Module, alpha: float) -> None:
    for layer in layers(model):
        layer.set_scale("default", alpha)


def loss(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens(), labels=tokens()).loss


# What works on every base.


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("config", CONFIGS)
def test_from_zero_to_a_saved_adapter(make, tmp_path, kind, config):
    """Zero is the base bit for bit, it learns, is saved small, loads, and can be disabled."""
    model = make(kind)
    base = logits(model)
    model = get_peft_model(model, CONFIGS[config]())
    assert "side" in {layer.path for layer in layers(model)}
    assert "path=side" in repr(model)
    assert torch.equal(logits(model), base)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(4):
        model.train()
        losses.append(loss(model))
        losses[-1].backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    trained = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(kind), tmp_path)), trained)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    set_scale(model, 0.0)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("config", CONFIGS)
def test_logits_and_gradients_are_those_of_the_dequantised_weights(make, kind, config):
    """For several α; and of an 8-bit base, which rounds its activations to 8 bits as well, as nearly as it can be."""
    model = make(kind)
    reference = tiny(**WIDE["llama"])
    if kind != "offloaded":
        reference = dequantised(model, reference)
    model, reference = (randomized(get_peft_model(m, CONFIGS[config]())) for m in (model, reference))
    assert {layer.path for layer in layers(reference)} == {"compose"}
    tolerance = 0.03 if kind == "8bit" else 1e-5
    for alpha in (1.0, 0.5, -2.0, 0.0):
        set_scale(model, alpha)
        set_scale(reference, alpha)
        assert (logits(model) - logits(reference)).abs().max() < tolerance * logits(reference).abs().max(), alpha
    for m in (model, reference):
        set_scale(m, 0.5)
        m.train()
        loss(m).backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - wanted.pop(name)).norm() <= 3 * tolerance * parameter.grad.norm(), name
    assert not wanted


@pytest.mark.parametrize("kind", BASES)
def test_roles_and_plan_see_the_logical_model(make, kind):
    """The packed weight of a 4-bit layer is (n, 1), and a tensor of torchao's says that it is float32."""
    model, plain = make(kind), tiny(**WIDE["llama"])
    assert roles(model) == roles(plain)
    config = HalfFTConfig(seed=1)
    table, wanted = plan(model, config), plan(plain, HalfFTConfig(seed=1))
    assert table.region == wanted.region
    assert (table.total, table.adapter_bytes) == (wanted.total, wanted.adapter_bytes)
    in_linears = sum(m.weight.numel() for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    saved = {"4bit": 3.5 * in_linears, "8bit": 3 * in_linears, "offloaded": 0}
    if kind in saved:
        assert base_bytes(plain) - base_bytes(model) == saved[kind]
    else:  # with its scales
        assert 2.8 * in_linears < base_bytes(plain) - base_bytes(model) < 3 * in_linears
    get_peft_model(model, config)
    assert config.resolved["region"].keys() == set(wanted.region)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_offloaded_conv1d(make, kind):
    """GPT-2 stores its weights the other way round, and ties its embeddings."""
    plain = tiny("gpt2", **WIDE["gpt2"])
    assert plan(make("offloaded", "gpt2"), CONFIGS[kind]()).total == plan(plain, CONFIGS[kind]()).total
    model, reference = (randomized(get_peft_model(m, CONFIGS[kind]())) for m in (make("offloaded", "gpt2"), plain))
    assert {layer.path for layer in layers(model)} == {"side"}
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)


def test_ties_are_seen_through_offloading(make):
    """accelerate gives each name of a tied tensor a meta tensor of its own; the delta would miss the head."""
    with pytest.raises(RegionError, match=r"'transformer.wte.weight' is tied to \['lm_head.weight'\]"):
        get_peft_model(make("offloaded", "gpt2"), HalfFTConfig(train_embeddings="input", fraction=1.0))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_norms_and_embeddings_of_an_offloaded_base(architecture):
    """Affine in their weights, also where the norm adds 1 and the embedding is scaled (Gemma)."""
    names = {
        "llama": ["embed_tokens", "input_layernorm", "norm", "lm_head"],
        "gpt2": ["wpe", "ln_1", "ln_f"],
        "gemma3": ["input_layernorm", "q_norm", "norm"],
    }[architecture]
    config = {"target_modules": names, "fraction": 1.0}
    reference = randomized(get_peft_model(tiny(architecture), HalfFTConfig(**config)))
    model = tiny(architecture)
    cpu_offload(model, execution_device="cpu")
    model = randomized(get_peft_model(model, HalfFTConfig(**config)))
    assert {layer.path for layer in layers(model)} == {"side"}
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)
    for m in (model, reference):
        loss(m).backward()
    grads = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    assert grads
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", BASES)
def test_several_adapters_and_held_numbers(make, kind):
    """Their contributions add up; what is held counts and does not learn."""
    model = get_peft_model(make(kind), HalfFTConfig(), adapter_name="a")
    model.add_adapter("b", HalfFTConfig(round_index=1))
    randomized(model)
    layer = next(layer for layer in layers(model) if {"a", "b"} <= layer.scaling.keys() and layer.path == "side")
    name = layer.parameter_names[0]
    held = Selection.rows(layer.deltas(name)["a"].shape, [0, 2])
    trained = Selection.rows(layer.deltas(name)["a"].shape, [1])
    layer.update_layer("c", {name: trained}, {name: held})
    delta = layer.deltas(name)["c"]
    with torch.no_grad():
        delta.delta.normal_()
        delta.held.normal_()
    x = torch.randn(5, 64)
    layer.set_adapter(["a", "b", "c"])
    layer.set_scale("b", 0.5)
    layer.set_scale("c", -2.0)
    deltas = layer.deltas(name)
    total = deltas["a"].dense() + 0.5 * deltas["b"].dense() - 2.0 * deltas["c"].dense()
    found = layer(x)
    torch.testing.assert_close(found, layer.base_layer(x) + F.linear(x, total), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert delta.held.grad is None
    assert delta.delta.grad is not None


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(make, kind, use_reentrant):
    grads = []
    for checkpoint in (False, True):
        model = randomized(get_peft_model(make(kind), HalfFTConfig())).train()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        loss(model).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", BASES)
def test_it_loads_in_other_ways_too(make, tmp_path, kind):
    """transformers' own loader puts an adapter of an offloaded model on the meta device and calls it loaded."""
    model = randomized(get_peft_model(make(kind), HalfFTConfig()))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(kind), tmp_path, low_cpu_mem_usage=True)), expected)
    base = make(kind)
    base.load_adapter(tmp_path)
    if kind == "offloaded":
        with pytest.raises(IsolateError, match="never loaded, or are offloaded"):
            logits(base)
    else:
        assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("kind", BASES)
def test_autocast(make, kind):
    model = randomized(get_peft_model(make(kind), HalfFTConfig())).train()
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model.train())
        lost = loss(model.train())
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    lost.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_bias_of_a_quantised_layer_is_composed(kind):
    """It is plain, so it merges exactly."""
    library = pytest.importorskip("torchao.quantization" if kind == "int8" else "bitsandbytes")
    plain = nn.Linear(64, 64)
    if kind == "int8":
        library.quantize_(plain, library.Int8WeightOnlyConfig())
    else:
        own = {"4bit": library.nn.Linear4bit, "8bit": library.nn.Linear8bitLt}[kind]
        quantised = own(
            64, 64, **({"compute_dtype": torch.float32} if kind == "4bit" else {"has_fp16_weights": False})
        )
        quantised.load_state_dict(plain.state_dict())
        plain = quantised.to("cpu")
    model = nn.Sequential(nn.Sequential(plain)).train()
    x = torch.randn(3, 64)
    base = model(x)
    config = GivenConfig(target_modules=[], target_parameters=["0.0.bias"], kind="whole")
    model = get_peft_model(model, config)
    (layer,) = layers(model)
    assert (layer.parameter_names, layer.path) == (["bias"], "compose")
    randomized(model).train()
    adapted = model(x)
    assert not torch.equal(adapted, base)
    model.merge_adapter()
    assert torch.equal(model(x), adapted)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base)


# How exactly.

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@st.composite
def linears(draw):
    """(dtype, n, the layer beside it, x, α, kind)"""
    dtype = draw(st.sampled_from(list(ROUNDOFF)))
    n_in, n_out = draw(st.sampled_from([1, 2, 7, 64, 700])), draw(st.sampled_from([1, 5, 16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    conv1d, bias = draw(st.booleans()), draw(st.booleans())
    base = Conv1D(n_out, n_in) if conv1d else nn.Linear(n_in, n_out, bias=bias)
    spread = draw(st.sampled_from([1e-4, 1e-2, 1.0]))
    kinds = draw(st.lists(st.sampled_from([k for k in KINDS if k != "all_but"]), min_size=1, max_size=2, unique=True))
    layer = DeltaLayer(base.to(dtype).requires_grad_(False), "halfft_")
    shape = tuple(base.weight.shape)
    for kind in kinds:
        places = {"weight": Selection.whole(shape) if kind == "whole" else getattr(Selection, kind)(shape, [0])}
        if kind == "whole" and base.bias is not None:
            places["bias"] = Selection.whole((n_out,))
        layer.update_layer(kind, places)
        layer.set_scale(kind, draw(st.sampled_from([1.0, 1.0, 0.5, 0.3, -1.7])))
    layer.set_adapter(kinds)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            size = spread if "halfft_" in name else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    rows = draw(st.sampled_from([(3,), (2, 3)]))
    return layer, torch.randn(*rows, n_in, generator=generator).to(dtype)


def exact(layer: DeltaLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum in fp64, and the bound on what the side path may be off by, from the formula in `beside`."""
    dtype, base = x.dtype, layer.base_layer
    x = x.double()
    result = x.new_zeros(())
    magnitude = x.new_zeros(())
    summands, tiny_steps = 0, 0.0
    scaled = False

    def product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x @ weight if isinstance(base, Conv1D) else x @ weight.T

    def add(weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        nonlocal result, magnitude
        for part in (weight, bias):
            if part is None:
                continue
            result = result + (product(part, x) if part is weight else part)
            magnitude = magnitude + (product(part.abs(), x.abs()) if part is weight else part.abs())

    add(base.weight.double(), None if base.bias is None else base.bias.double())
    for name in layer.parameter_names:
        for adapter, delta in layer.deltas(name).items():
            alpha = layer.scaling[adapter]
            scaled |= alpha != 1.0
            dense = alpha * delta.dense().double()
            add(*((dense, None) if name == "weight" else (None, dense)))
            summands += 1
            tiny_steps += max(1.0, abs(alpha)) * 2.0**-25
    u = ROUNDOFF[dtype]
    bound = ((2 + summands + scaled) * u + x.shape[-1] * 2.0**-24) * magnitude * (1 + 16 * u)
    if dtype == torch.float16:
        bound = bound + tiny_steps * (x.abs().sum(-1, keepdim=True) + 3)
    return result, bound


@settings(max_examples=150, deadline=None)
@given(linears())
def test_the_error_is_within_the_bound_that_beside_states(case):
    """W0 is plain here, so that its own error is known; and the two paths differ by no more than both bounds."""
    layer, x = case
    with torch.no_grad():
        composed = layer(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeltaLayer, "path", "side")
            beside = layer(x)
    wanted, bound = exact(layer, x)
    assert ((beside.double() - wanted).abs() <= bound).all(), ((beside.double() - wanted).abs() / bound).max()
    assert ((beside.double() - composed.double()).abs() <= 2 * bound).all()


def test_the_bound_is_not_idle():
    """In bf16 the error comes within a factor of eight of it: a bound that nothing can reach says nothing."""
    torch.manual_seed(0)
    layer = DeltaLayer(nn.Linear(2, 512, bias=False).bfloat16().requires_grad_(False), "halfft_")
    layer.update_layer("default", {"weight": Selection.whole((512, 2))})
    layer.set_adapter(["default"])
    with torch.no_grad():
        layer.deltas("weight")["default"].delta.normal_()
    x = torch.randn(64, 2).bfloat16()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(DeltaLayer, "path", "side")
        beside = layer(x)
    wanted, bound = exact(layer, x)
    assert 1 / 8 < ((beside.double() - wanted).abs() / bound).max() <= 1


def saved_bytes(function: Callable[[], torch.Tensor]) -> int:
    """Bytes kept for backward, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("elements", "all_but")])
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_is_kept_for_backward_but_the_input(monkeypatch, kind, transposed):
    monkeypatch.setattr(DeltaLayer, "path", "side")
    base = (Conv1D(96, 64) if transposed else nn.Linear(64, 96)).requires_grad_(False)
    shape = tuple(base.weight.shape)
    layer = DeltaLayer(base, "halfft_")
    place = Selection.whole(shape) if kind == "whole" else getattr(Selection, kind)(shape, [0, 1, 2])
    layer.update_layer("default", {"weight": place, "bias": Selection.whole((96,))})
    layer.set_adapter(["default"])
    x = torch.randn(8, 64, requires_grad=True)
    delta = layer.deltas("weight")["default"].delta
    there = [x, base.weight, delta, layer.deltas("bias")["default"].delta]
    allowed = sum(t.numel() * t.element_size() for t in there) + 64
    assert saved_bytes(lambda: layer(x)) <= allowed
    assert saved_bytes(lambda: layer(x) + (F.linear(x, torch.zeros(999, 64) + delta.sum()))[..., :96]) > allowed


# What does not.


@pytest.mark.parametrize("kind", BASES)
def test_nothing_is_merged(make, kind):
    """Not even the layers that could be; and the base comes back as it was."""
    model = make(kind)
    base = logits(model)
    model = randomized(get_peft_model(model, HalfFTConfig()))
    adapted = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        for safe_merge in (False, True):
            with pytest.raises(IsolateError, match=r"is quantised, sharded or offloaded .*merge there"):
                merge(safe_merge=safe_merge)
            assert not any(layer.merged for layer in layers(model))
            assert torch.equal(logits(model), adapted)
    model.add_adapter("other", HalfFTConfig(round_index=1))
    model.delete_adapter("other")
    assert torch.equal(logits(model), adapted)
    assert torch.equal(logits(model.unload()), base)


@pytest.mark.parametrize("kind", QUANTISED)
def test_an_adapter_of_the_plain_base_on_the_quantised_one(make, tmp_path, kind):
    """Norms and embeddings tell the bases apart, and it is said that the rest was not compared."""
    plain = tiny(**WIDE["llama"]).bfloat16()
    randomized(get_peft_model(plain, HalfFTConfig())).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"only 7 of 21 tensors .*not fully checked"):
        model = PeftModel.from_pretrained(make(kind), tmp_path)
    assert {layer.path for layer in layers(model)} == {"side", "compose"}
    with pytest.raises(BaseMismatchError, match="is another base"):
        PeftModel.from_pretrained(make(kind, "another"), tmp_path)


class Doubling(nn.Linear):
    """A subclass whose forward nobody knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) ** 2


class NormHead(nn.Linear):
    """Baichuan 2's: called a norm, and anything but affine."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, F.normalize(self.weight))


@pytest.mark.parametrize("module", [Doubling(4, 4), NormHead(4, 4), nn.Embedding(4, 4, max_norm=1.0), nn.PReLU()])
def test_what_cannot_stand_beside_is_refused(module):
    model = nn.Sequential(nn.Sequential(module))
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(RegionError, match=r"'0.0.weight' of .*quantised, sharded or offloaded.*exclude_modules"):
        get_peft_model(model, HalfFTConfig(target_modules=["0.0"], fraction=1.0))


def test_routers_and_fused_experts_cannot_stand_beside():
    model = tiny("mixtral")
    cpu_offload(model, execution_device="cpu")
    for excluded, refused in (
        (None, r"gate\.weight' of MixtralTopKRouter"),
        (["gate"], r"experts\.\w+' of MixtralExperts"),
    ):
        with pytest.raises(RegionError, match=f"{refused} is quantised, sharded or offloaded"):
            get_peft_model(model, HalfFTConfig(exclude_modules=excluded))
    attention = HalfFTConfig(target_modules=["q_proj", "v_proj"])
    assert {layer.path for layer in layers(get_peft_model(model, attention))} == {"side"}


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
        (nn.BatchNorm1d(4), (8, 4, 3)),
        (nn.GroupNorm(2, 4), (2, 4, 9)),
        (nn.LayerNorm(4), (2, 4)),
    ],
)
def test_convolutions_and_norms_stand_beside(module, shape):
    """Also those that count their forwards: a running average moves once, as without an adapter."""
    x = torch.randn(shape)
    plain = nn.Sequential(module)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    reference = get_peft_model(plain, GivenConfig(target_modules=["0"], kind="whole"))
    expected = randomized(reference).train()(x)
    counts = {name: buffer.clone() for name, buffer in module.named_buffers()}
    model = reference.unload()
    model.load_state_dict(state)
    cpu_offload(model, execution_device="cpu")
    model = randomized(get_peft_model(model, GivenConfig(target_modules=["0"], kind="whole"))).train()
    assert layers(model)[0].path == "side"
    torch.testing.assert_close(model(x), expected)
    for name, buffer in layers(model)[0].base_layer.named_buffers():
        torch.testing.assert_close(buffer, counts[name])


def test_a_module_that_reads_its_childs_weight(make):
    """torchao's tensors compute wherever they are read, so what is read has the deltas; packed ones do not."""
    model = randomized(get_peft_model(make("int8"), HalfFTConfig(fraction=1.0)))
    x = torch.randn(3, 64)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(F.linear(x, layer.weight), layer(x), rtol=1e-4, atol=1e-5)
    layer = randomized(get_peft_model(make("4bit"), HalfFTConfig(fraction=1.0))).base_model.model.model.layers[0]
    assert layer.self_attn.q_proj.weight is layer.self_attn.q_proj.base_layer.weight


# Offloading and sharding.


@pytest.mark.parametrize("config", CONFIGS)
def test_a_wrapped_model_is_offloaded(tmp_path, config):
    """The deltas are offloaded, too: they are brought for their own forward. They cannot be trained there."""
    model = randomized(get_peft_model(tiny(), CONFIGS[config]()))
    expected = logits(model)
    cpu_offload(model, execution_device="cpu")
    assert {layer.path for layer in layers(model)} == {"side"}
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(IsolateError, match=r"deltas are offloaded.*wrap it then"):
        loss(model.train())
    with pytest.raises(IsolateError, match=r"numbers of adapter 'default' are offloaded.*remove_hook_from_submodules"):
        model.save_pretrained(tmp_path)
    remove_hook_from_submodules(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path)), expected)


def test_a_wrapped_model_is_dispatched(tmp_path):
    """Layers here and there: each takes the path it can."""
    model = randomized(get_peft_model(tiny(), HalfFTConfig()))
    expected = logits(model)
    inner = "base_model.model.model"
    places = {f"{inner}.layers.{i}": place for i, place in enumerate(("cpu", "disk", "cpu"))}
    places |= {f"{inner}.{n}": "cpu" for n in ("embed_tokens", "rotary_emb")}
    places |= {f"{inner}.norm": "disk", "base_model.model.lm_head": "disk"}
    model = dispatch_model(model, places, offload_dir=tmp_path)
    assert {layer.path for layer in layers(model)} == {"side", "compose"}
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["base", "deltas"])
def test_one_of_base_and_deltas_is_offloaded(part):
    model = randomized(get_peft_model(tiny(), HalfFTConfig()))
    expected = logits(model)
    for layer in layers(model):
        modules = [layer.base_layer] if part == "base" else [layer.deltas(n)["default"] for n in layer.parameter_names]
        for module in modules:
            cpu_offload(module, execution_device="cpu")
    for layer in layers(model):
        layer._move_adapter_to_device_of_base_layer("default")  # the device of its forward, not "meta"
    assert {layer.path for layer in layers(model)} == {"side"}
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(IsolateError, match="quantised, sharded or offloaded"):
        model.merge_adapter()


def sharded(model: nn.Module) -> nn.Module:
    """Each parameter as ZeRO-3 leaves it on one process: its numbers are elsewhere."""
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape, parameter.ds_numel = i, parameter.shape, parameter.numel()
        parameter.data = torch.empty(0)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "mixtral", "qwen2_moe", "bert", "t5"])
def test_zero_3_keeps_the_shapes_elsewhere(architecture):
    plain, model = tiny(architecture), sharded(tiny(architecture))
    assert roles(model) == roles(plain)
    assert base_bytes(model) == base_bytes(plain)
    assert not any(is_plain(p, m) for m in model.modules() for p in m._parameters.values() if p is not None)
    if architecture in ("llama", "gpt2"):
        assert plan(model, HalfFTConfig()).region == plan(plain, HalfFTConfig()).region
        wrapped = get_peft_model(model, HalfFTConfig())
        assert {layer.path for layer in layers(wrapped)} == {"side"}
        delta = layers(wrapped)[0].deltas("weight")["default"]
        assert delta.shape == tuple(layers(wrapped)[0].base_layer.weight.ds_shape)
        assert layers(wrapped)[0].weight is layers(wrapped)[0].base_layer.weight, "asked for its dtype in a forward"


class Float8Linear(nn.Linear):
    """As in transformers: a class of its own, over a weight that torch cannot add to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def test_a_float8_weight_stands_beside():
    module = Float8Linear(6, 8)
    module.weight = nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    x = torch.randn(3, 6)
    base = module(x)
    model = randomized(get_peft_model(nn.Sequential(nn.Sequential(module)), GivenConfig(target_modules=["0.0"])))
    (layer,) = layers(model)
    delta = layer.deltas("weight")["default"]
    assert (layer.path, delta.delta.dtype) == ("side", torch.float32)
    torch.testing.assert_close(model(x), base + F.linear(x, delta.dense(), layer.deltas("bias")["default"].dense()))


def test_the_shape_of_a_packed_weight_without_its_state():
    """On the meta device, or sharded by FSDP, a 4-bit weight has lost its own."""
    module = nn.Linear(6, 8)
    module.weight = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    assert logical_shape(module, "weight", module.weight) == (8, 6)
    assert can_stand_beside(module)
