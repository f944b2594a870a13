"""transformers' own doors: `model.load_adapter` and its siblings inject into a plain model, without a PeftModel.

They run their own loader, which asks none of PEFT's hooks: what is missing or too much in a file is only reported, as
with any PEFT method; damaged numbers and codes are refused by the delta itself.
"""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_isolate import CoreIsolationConfig, HalfFTConfig, next_round
from peft_isolate.deltas import DeltaLayer
from peft_isolate.errors import BaseMismatchError, FormatError, IsolateError
from tests.compare import adapter, assert_same, base, bits, logits
from tests.given import GivenConfig
from tests.learn import dense, filled, held, learn, learning
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take")

DTYPES = (torch.float32, torch.bfloat16)


def half() -> HalfFTConfig:
    return HalfFTConfig()


def elements(seed: int = 0) -> GivenConfig:
    return GivenConfig(kind="elements", seed=seed)


def all_but(seed: int = 0) -> GivenConfig:
    return GivenConfig(kind="all_but", seed=seed)


METHODS = {"half": half, "elements": elements, "all_but": all_but, "held": half}


def reference(method: str, folder, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A PeftModel with an adapter as if trained; saved in `folder`/adapter, on a base in `folder`/base."""
    tiny(dtype=dtype).save_pretrained(folder / "base")
    model = filled(get_peft_model(start(folder, dtype), METHODS[method]()))
    if method == "held":
        next_round(model)
        filled(model, seed=1)
    model.save_pretrained(folder / "adapter")
    return model


def start(folder, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)


def tampered(folder, change) -> str:
    """The adapter with its tensors changed by `change(tensors)`."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    change(tensors)
    (folder / "changed").mkdir()
    save_file(tensors, folder / "changed" / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "changed" / "adapter_config.json").write_text((folder / "adapter" / "adapter_config.json").read_text())
    return str(folder / "changed")


def numbers(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """As `adapter`, under the names that a PeftModel has."""
    found = adapter(model, name)
    return {key if key.startswith("base_model") else f"base_model.model.{key}": value for key, value in found.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_load_adapter_gives_the_logits_of_a_peft_model(method, dtype, tmp_path):
    """The deltas stay fp32 over a bf16 base, in which transformers would load them; what is held stays frozen."""
    model = reference(method, tmp_path, dtype)
    expected = logits(model)
    assert not torch.equal(expected, logits(start(tmp_path, dtype)))
    for arguments in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        loaded = start(tmp_path, dtype)
        report = loaded.load_adapter(tmp_path / "adapter", **arguments)
        assert not {*report.missing_keys, *report.unexpected_keys, *report.mismatched_keys}
        assert torch.equal(logits(loaded), expected), arguments
        assert_same(dense(loaded), dense(model))  # at the holes there was noise, which is not saved
        assert {value.dtype for value in numbers(loaded).values()} == {torch.float32}
        trained = {name for name, _ in loaded.named_parameters() if name.endswith(".default.delta")}
        assert learning(loaded) == (trained if "is_trainable" in arguments else set())
    for found in (
        AutoModelForCausalLM.from_pretrained(_with_its_base(tmp_path), dtype=dtype),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=dtype, device_map={"": "cpu"}),
    ):
        assert torch.equal(logits(found), expected)
        assert_same(dense(found), dense(model))


def _with_its_base(folder):
    """The folder of the adapter, whose config says where the base is."""
    path = folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["base_model_name_or_path"] == str(folder / "base")
    return folder / "adapter"


def test_what_is_held_stays_while_a_loaded_adapter_learns(tmp_path):
    """`is_trainable=True` makes whatever it assigned trainable, asking nobody; AdamW's decay would shrink it."""
    reference("held", tmp_path)
    model = start(tmp_path)
    model.load_adapter(tmp_path / "adapter", is_trainable=True)
    kept, before = held(model), logits(model)
    assert kept
    untouched = base(model)
    learn(model)
    assert not torch.equal(logits(model), before)
    assert_same(held(model), kept)
    assert_same(base(model), untouched)
    model.disable_adapters()
    model.enable_adapters()
    model.set_adapter("default")
    assert not any(name.endswith(".held") for name in learning(model))
    assert_same(held(learn(model)), kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["half", "elements", "all_but"])
def test_add_train_save_disable_and_delete(method, dtype, tmp_path):
    """A model's whole life in transformers, and at its end the base, bit for bit."""
    reference(method, tmp_path, dtype)
    model = start(tmp_path, dtype)
    untouched, plain = base(model), logits(model)
    model.add_adapter(METHODS[method]())
    assert {value.dtype for value in numbers(model).values()} == {torch.float32}
    assert torch.equal(logits(model), plain)
    learn(model)
    adapted = logits(model)
    assert not torch.equal(adapted, plain)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), adapted)

    state = model.get_adapter_state_dict()
    n_codes = 0 if method == "half" else len(numbers(model))
    assert len(state) == len(numbers(model)) + n_codes
    model.save_pretrained(tmp_path / "saved")
    for loaded in (
        PeftModel.from_pretrained(start(tmp_path, dtype), tmp_path / "saved"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype),
    ):
        assert torch.equal(logits(loaded), adapted)
    loaded = start(tmp_path, dtype)
    loaded.load_adapter(peft_config=PeftConfig.from_pretrained(tmp_path / "saved"), adapter_state_dict=state)
    assert torch.equal(logits(loaded), adapted)

    # The second one has a base config of its own: other positions, decoded beside the first's.
    model.load_adapter(tmp_path / "adapter", adapter_name="second")
    model.set_adapter("second")
    second = logits(PeftModel.from_pretrained(start(tmp_path, dtype), tmp_path / "adapter"))
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), adapted)
    model.delete_adapter("second")
    assert torch.equal(logits(model), adapted)
    model.delete_adapter("default")
    assert torch.equal(logits(model), plain)
    left = {name: value for name, value in base(model).items() if "given_" not in name and "halfft_" not in name}
    assert_same(left, untouched)


@pytest.mark.parametrize("method", METHODS)
def test_damaged_numbers_are_refused(method, tmp_path):
    """transformers assigns tensor by tensor and asks no hook of PEFT's: the delta itself says no."""
    reference(method, tmp_path)
    suffix = ".held" if method == "held" else ".delta"

    def nan(tensors):
        next(value for name, value in tensors.items() if name.endswith(suffix)).view(-1)[0] = float("nan")

    with pytest.raises(FormatError, match="holds NaN or infinity: the training diverged or the file is damaged"):
        start(tmp_path).load_adapter(tampered(tmp_path, nan))


@pytest.mark.parametrize("method", ["elements", "all_but"])
def test_codes_that_are_none_are_refused_before_they_are_used(method, tmp_path):
    """Zeros are never a code: a model that got none says so instead of computing with other positions."""
    reference(method, tmp_path)

    def zeroed(tensors):
        next(value for name, value in tensors.items() if name.endswith("_codes")).zero_()

    model = start(tmp_path)
    model.load_adapter(tampered(tmp_path, zeroed))
    with pytest.raises(FormatError, match="never loaded or the file was altered"):
        logits(model)


def test_another_base_is_refused_before_anything_is_wrapped(tmp_path):
    reference("elements", tmp_path)
    other = tiny(seed=1)
    with pytest.raises(BaseMismatchError, match=r"another base than the adapter's: 'model\.embed_tokens\.weight' has"):
        other.load_adapter(tmp_path / "adapter")
    assert not any(isinstance(module, DeltaLayer) for module in other.modules())
    assert_same(dict(other.named_parameters()), dict(tiny(seed=1).named_parameters()))


@pytest.mark.parametrize("method", ["half", "elements"])
def test_missing_and_extra_tensors_are_in_transformers_report_only(method, tmp_path):
    """As with any PEFT method through this door. What is missing of a delta stays zero; PeftModel refuses both."""
    model = reference(method, tmp_path)
    lost = next(name for name in numbers(model) if name.endswith("q_proj.given_weight.delta") or method == "half")

    def change(tensors):
        del tensors[lost]
        tensors[lost.replace("layers.0", "layers.9")] = torch.zeros(3)

    folder = tampered(tmp_path, change)
    loaded = start(tmp_path)
    report = loaded.load_adapter(folder)
    assert [name.replace("default.", "") for name in report.missing_keys] == [lost.removeprefix("base_model.model.")]
    assert len(report.unexpected_keys) == 1
    wanted = numbers(model)
    wanted[lost] = torch.zeros_like(wanted[lost])
    found = numbers(loaded)
    assert all(torch.equal(bits(found[name]), bits(wanted[name])) for name in wanted)
    with pytest.raises(FormatError, match="does not hold the region"):
        PeftModel.from_pretrained(start(tmp_path), folder)


def test_two_methods_do_not_share_a_module():
    """PEFT saves an adapter by the names of its method: the other one's numbers would be lost."""
    model = tiny()
    model.add_adapter(HalfFTConfig(), "a")
    with pytest.raises(IsolateError, match=r"has a delta of another method of this library.*or exclude the module"):
        model.add_adapter(CoreIsolationConfig(), "b")
    model.delete_adapter("a")
    model.add_adapter(CoreIsolationConfig(), "c")
