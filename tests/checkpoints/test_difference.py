"""Any tuned model as a stream of differences: models, state dicts, folders, adapters, live and saved."""

from __future__ import annotations

import json

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn

from peft_isolate import CoFiTuneConfig, HalfFTConfig, next_round
from peft_isolate.checkpoints.compress import compress
from peft_isolate.checkpoints.difference import difference, difference_of
from peft_isolate.checkpoints.extract import extract
from peft_isolate.checkpoints.weights import weights_of
from peft_isolate.deltas.adapters import parameter_deltas
from peft_isolate.errors import BaseMismatchError, IsolateError, RegionError
from peft_isolate.regions import base_parameters, roles
from tests.checkpoints.folders import load, saved, trained, with_tokens
from tests.checkpoints.tunings import UP, by_hand, everything, lora, tuned
from tests.compare import assert_same, logits
from tests.given import GivenConfig
from tests.importances import importance
from tests.learn import filled
from tests.models import CONFIGS, tiny

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:Could not find a config file")

ADAPTED = ["llama", "gemma2", "gpt2", "mixtral"]


# ------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_models_state_dicts_and_sharded_folders_are_one(architecture, dtype, tmp_path):
    """Whatever base and tuned model lie in, the parameters in memory and their differences are the same bits."""
    base = saved(tmp_path / "base", architecture, dtype, max_shard_size="20KB")
    tuned(tmp_path / "tuned", everything, architecture, dtype)
    models = [load(folder, architecture) for folder in (base, tmp_path / "tuned")]
    wanted = {name: delta.float() for name, delta in by_hand(*models).items()}
    for bases, others in (
        (models[0], models[1]),
        (base, tmp_path / "tuned"),
        (str(base), models[1]),
        (models[0], models[1].state_dict()),
        (base, models[1].state_dict()),
        (models[0].state_dict(), models[1].state_dict()),
    ):
        found = difference_of(bases, others)
        assert set(found) == set(wanted)
        assert found.touched == list(found)
        for name in found:
            assert found[name].dtype == torch.float32
            assert found[name].is_contiguous()
            assert torch.equal(found[name], wanted[name]), name
        for name, before, after in found.pairs(wanted)():
            assert torch.equal(after.float() - before.float(), wanted[name])
    assert list(difference_of(base, tmp_path / "tuned")) == list(wanted)


def test_float64_stays_float64_and_pieces_are_all_there():
    """A difference is taken in the wider dtype of the two, over any strides, a few scalars at a time."""
    a, b = torch.randn(7, 5, dtype=torch.float64), torch.randn(5, 7).T
    assert torch.equal(difference(a, b), b.double() - a)
    assert difference(a, b).dtype == torch.float64
    large = torch.randn(3, 2**19 + 5)
    assert torch.equal(difference(large[:, 1:].bfloat16(), large[:, 1:]), large[:, 1:] - large[:, 1:].bfloat16())
    parameter = nn.Parameter(torch.ones(3))
    assert not difference(parameter, parameter).requires_grad


def test_adapters_over_float64(tmp_path):
    """Their numbers are float64, from a folder, too."""
    base = saved(tmp_path / "base", dtype=torch.float64)
    adapter = trained(base, GivenConfig(), tmp_path / "adapter")
    model = PeftModel.from_pretrained(load(base), adapter)
    for other in (model, adapter):
        for name, delta in difference_of(base, other).items():
            assert delta.dtype == torch.float64
            if name == UP:
                assert torch.equal(delta, parameter_deltas(model, "default")[UP].dense())


def test_buffers_are_no_parameters():
    """A state dict has them, too: what a batch norm has counted is no difference that a region could name."""
    base, other = (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
    other[1].running_mean.add_(1.0)
    found = difference_of(base, other.state_dict())
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert torch.equal(found["0.weight"], (other[0].weight - base[0].weight).detach())


def test_a_tuned_folder_is_read_as_the_bases_class(tmp_path):
    """Also where its config does not say which that is."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned", everything)
    wanted = dict(difference_of(base, theirs))
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    for bases in (base, load(base)):
        assert_same(dict(difference_of(bases, theirs)), wanted)


def test_a_state_dict_alone_knows_its_embeddings():
    """Modules are known by their names: scope, layers and ties are those of the model."""
    for architecture in ("llama", "gemma2", "gpt2", "mixtral", "gpt_neox", "opt"):
        model = tiny(architecture)
        weights = weights_of(model.state_dict())
        assert set(weights) == set(base_parameters(model))
        ours, theirs = (
            {r.parameter: (r.name if r.name in ("embedding", "head", "norm") else "", r.layer) for r in roles(each)}
            for each in (weights.model, model)
        )
        assert ours == theirs
        assert_same({n: weights[n] for n in weights}, {n: p.detach() for n, p in base_parameters(model).items()})


def test_weights_pass_through_and_name_their_folder(tmp_path):
    """A base opened once is used for many tasks."""
    base = saved(tmp_path / "base")
    weights = weights_of(base)
    assert weights_of(weights) is weights
    assert weights.folder == base
    assert weights.name == str(base)
    assert (weights_of(tiny()).folder, len(weights)) == (None, len(base_parameters(tiny())))
    assert next(weights.model.parameters()).is_meta
    assert weights.shapes[UP] == (48, 32)
    with pytest.raises(RegionError, match="no parameter 'nothing'"):
        weights["nothing"]


def test_nothing_is_kept(tmp_path):
    """Each Δ is made from what is there when it is asked for."""
    base, model = tiny(), tiny()
    found = difference_of(base, model)
    assert not found[UP].any()
    with torch.no_grad():
        base_parameters(model)[UP].add_(1.0)
    assert torch.equal(found[UP], by_hand(base, model)[UP].float())


def test_what_is_no_tuned_model(tmp_path):
    """New, missing and resized tensors by name and both shapes; other things by what they are."""
    base = tiny()
    state = base.state_dict()
    with pytest.raises(RegionError, match=r"'extra.weight' of shape \(2,\) is only in the tuned"):
        difference_of(base, state | {"extra.weight": torch.ones(2)})
    with pytest.raises(RegionError, match=rf"'{UP}' of shape \(48, 32\) is only in the base"):
        difference_of(base, {name: tensor for name, tensor in state.items() if name != UP})
    with pytest.raises(RegionError, match=rf"'{UP}' is \(48, 32\) in the base and \(4, 3\)"):
        difference_of(base, state | {UP: torch.ones(4, 3)})
    with pytest.raises(RegionError, match="is only in the"):
        difference_of(base, tiny("gpt2"))
    with pytest.raises(RegionError, match=r"\(50, 32\) in the base and \(64, 32\)"):
        difference_of(tiny(vocab_size=50), base)
    with pytest.raises(IsolateError, match="int is no model"):
        difference_of(base, 3)
    with pytest.raises(IsolateError, match="is a str, no tensor"):
        difference_of(base, {"a": "b"})
    with pytest.raises(IsolateError, match="no floating-point tensor"):
        difference_of({}, {})
    with pytest.raises(IsolateError, match="is on the meta device"):
        difference_of(base, weights_of(saved(tmp_path / "base")).model)
    with pytest.raises(IsolateError, match="difference already"):
        difference_of(base, difference_of(base, base))
    extract(saved(tmp_path / "b"), tuned(tmp_path / "t", everything), tmp_path / "exact", mode="exact")
    with pytest.raises(IsolateError, match=r"exact difference, which speaks of files: merge\("):
        difference_of(tmp_path / "b", tmp_path / "exact")
    with pytest.raises(IsolateError, match="quantised"):
        difference_of(base, state | {UP: torch.ones(48, 32).to(torch.float8_e4m3fn)})


def test_tied_names_that_differ_in_a_state_dict():
    """A head that is tied in the base and another in the state dict would be missed: it is refused."""
    base = tiny("gemma2")
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    assert not any(delta.any() for delta in difference_of(base, state).values())
    state["lm_head.weight"] += 1
    with pytest.raises(RegionError, match=r"'lm_head\.weight' differ in the state dict, and are tied"):
        difference_of(base, state)
    only_head = {name: tensor for name, tensor in base.state_dict().items() if "embed_tokens" not in name}
    assert not any(delta.any() for delta in difference_of(base, only_head).values())


# ------------------------------------------------------------------------------------------------- our own adapters


@pytest.mark.parametrize("kind", ["whole", "rows", "columns", "elements", "all_but"])
@pytest.mark.parametrize("architecture", ADAPTED)
def test_our_adapters_live_and_saved(architecture, kind, tmp_path):
    """Δ is the adapter's own numbers, to the bit, over a bf16 base; where it does not act, zero."""
    base = saved(tmp_path / "base", architecture, torch.bfloat16)
    adapter = trained(base, GivenConfig(kind=kind), tmp_path / "adapter", architecture)
    model = PeftModel.from_pretrained(load(base, architecture), adapter)
    wanted = {name: delta.dense() for name, delta in parameter_deltas(model, "default").items()}
    before = logits(model)
    for bases, others in ((base, adapter), (load(base, architecture), model), (base, model), (model, str(adapter))):
        found = difference_of(bases, others)
        assert set(found) == set(base_parameters(model))
        assert set(found.touched) == set(wanted)
        for name, delta in found.items():
            assert delta.dtype == torch.float32
            assert torch.equal(delta, wanted.get(name, torch.zeros(delta.shape))), name
        for name, zero, delta in found.pairs(list(found))():
            assert not zero.any()
            assert torch.equal(delta, found[name])
    assert torch.equal(logits(model), before)


def test_held_numbers_soft_masks_and_scales(tmp_path):
    """Σ α·(held + (1 − I)·Δ) over the active adapters, which is what the model adds."""
    base = saved(tmp_path / "base")
    config = CoFiTuneConfig(importance=importance())
    model = filled(get_peft_model(load(base), config))
    model.save_pretrained(tmp_path / "masked")
    wanted = {name: delta.dense() for name, delta in parameter_deltas(model, "default").items()}
    undamped = {name: delta.delta.detach() for name, delta in parameter_deltas(model, "default").items()}
    assert any(not torch.equal(wanted[name], undamped[name]) for name in wanted)
    for other in (model, tmp_path / "masked"):
        found = difference_of(base, other)
        assert_same({name: found[name] for name in wanted}, wanted)

    halves = filled(get_peft_model(load(base), HalfFTConfig()))
    next_round(halves)
    filled(halves, seed=3)
    halves.save_pretrained(tmp_path / "halves")
    wanted = {name: delta.dense() for name, delta in parameter_deltas(halves, "default").items()}
    for other in (halves, tmp_path / "halves"):
        found = difference_of(base, other)
        assert any(name.startswith("model.layers") for name in found.touched)
        assert_same({name: found[name] for name in wanted}, wanted)

    halves.add_adapter("second", HalfFTConfig(seed=5))
    filled(halves, "second", seed=7)
    halves.base_model.set_adapter(["default", "second"])
    for layer in halves.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("second", 0.5)
    found = difference_of(base, halves)
    second = {name: delta.dense() for name, delta in parameter_deltas(halves, "second").items()}
    for name, delta in found.items():
        zero = torch.zeros(delta.shape)
        assert torch.equal(delta, wanted.get(name, zero) + 0.5 * second.get(name, zero)), name
    halves.base_model.set_adapter("second")
    alone = difference_of(base, halves)
    assert set(alone.touched) == set(second)
    assert all(torch.equal(alone[name], 0.5 * delta) for name, delta in second.items())
    for layer in halves.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("second", 0.0)
    assert difference_of(base, halves).touched == []


def test_small_updates_are_not_rounded_to_the_base(tmp_path):
    """Of 1e-7 over a bf16 base nothing would be left in the merged weights; Δ has all of it."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    model = filled(get_peft_model(load(base), GivenConfig()))
    with torch.no_grad():
        for delta in parameter_deltas(model, "default").values():
            delta.delta.mul_(1e-6)
    model.save_pretrained(tmp_path / "adapter")
    found = difference_of(base, tmp_path / "adapter")
    for name, delta in parameter_deltas(model, "default").items():
        assert torch.equal(found[name], delta.dense())


def test_packed_and_bf16_adapters(tmp_path):
    """What was compressed, or saved in bf16, counts as the model has it that loads it."""
    base = saved(tmp_path / "base")
    config = CoFiTuneConfig(importance=importance(), save_dtype="bfloat16")
    trained(base, config, tmp_path / "bf16")
    trained(base, GivenConfig(), tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "packed")
    for folder in (tmp_path / "bf16", tmp_path / "packed"):
        model = PeftModel.from_pretrained(load(base), folder)
        live, from_file = difference_of(base, model), difference_of(base, folder)
        assert live.touched
        assert_same(dict(from_file), dict(live))
        assert_same(
            {name: live[name] for name in live.touched},
            {name: delta.dense() for name, delta in parameter_deltas(model, "default").items()},
        )


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("config", [HalfFTConfig(), lora("llama")], ids=["ours", "lora"])
def test_merged_and_disabled_adapters(config):
    """A merged model's base weights are not W0; a disabled adapter is most likely an oversight."""
    base, model = tiny(), get_peft_model(tiny(), config)
    model.merge_adapter()
    for left, right in ((base, model), (model, base)):
        with pytest.raises(IsolateError, match="adapters are merged into the model"):
            difference_of(left, right)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(IsolateError, match="are disabled"):
        difference_of(base, model)
    if isinstance(config, HalfFTConfig):
        assert difference_of(base, model).touched
    else:  # PEFT's unmerging subtracts, which leaves W0 rounded
        with pytest.raises(BaseMismatchError):
            difference_of(base, model)


def test_another_base(tmp_path):
    """An adapter's Δ over another base than its own is no difference of anything."""
    base, other = saved(tmp_path / "base"), saved(tmp_path / "other", seed=1)
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter")
    live = PeftModel.from_pretrained(load(base), adapter)
    for tuned_model in (adapter, live, get_peft_model(load(base), lora("llama"))):
        with pytest.raises(BaseMismatchError, match="another base"):
            difference_of(other, tuned_model)
    pissa = get_peft_model(load(base), lora("llama", init_lora_weights="pissa"))
    with pytest.raises(BaseMismatchError, match="another base"):
        difference_of(base, pissa)
    small = saved(tmp_path / "small", hidden_size=16)
    for tuned_model in (adapter, live):
        with pytest.raises(RegionError, match=r"\(32,\) .*\(16,\)|\(16, 32\)|\(64, 16\)"):
            difference_of(small, tuned_model)


def test_the_check_can_be_skipped(tmp_path, monkeypatch):
    """As everywhere."""
    base, other = saved(tmp_path / "base"), saved(tmp_path / "other", seed=1)
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter")
    monkeypatch.setenv("PEFT_ISOLATE_SKIP_BASE_CHECK", "1")
    with pytest.warns(UserWarning, match="it was skipped"):
        found = difference_of(other, adapter)
    assert_same(dict(found), dict(difference_of(base, adapter)))


def test_tensors_beside_the_deltas(tmp_path):
    """modules_to_save, trained tokens and biases are no difference on a region; the message says to merge."""
    base = saved(tmp_path / "base")
    with_tokens(base, tmp_path / "tokens")
    with_tokens(base, tmp_path / "modules", modules_to_save=["lm_head"])
    for name in ("tokens", "modules"):
        for other in (tmp_path / name, PeftModel.from_pretrained(load(base), tmp_path / name)):
            with pytest.raises(RegionError, match=r"carries .* whole .*: merge it"):
                difference_of(base, other)
    for fields in ({"modules_to_save": ["norm"]}, {"bias": "all"}, {"trainable_token_indices": [1]}):
        model = get_peft_model(load(base), lora("llama", **fields))
        model.save_pretrained(tmp_path / f"lora{next(iter(fields))}")
        for other in (model, tmp_path / f"lora{next(iter(fields))}"):
            with pytest.raises(RegionError, match=r"carries .* whole .*: merge it"):
                difference_of(base, other)


def test_embeddings_that_nobody_trained(tmp_path):
    """PEFT writes the embeddings along where it thinks that they may have changed: equal ones are no obstacle."""
    base = saved(tmp_path / "base")
    ours = filled(get_peft_model(load(base), HalfFTConfig()))
    theirs = get_peft_model(load(base), lora("llama"))
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name, save_embedding_layers=True)
        keys = load_file(tmp_path / name / "adapter_model.safetensors")
        assert any("embed_tokens" in key for key in keys)
        assert_same(dict(difference_of(base, tmp_path / name)), dict(difference_of(base, model)))
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(1.0)
        model.save_pretrained(tmp_path / f"{name}2", save_embedding_layers=True)
        with pytest.raises(RegionError, match=r"embed_tokens.* whole"):
            difference_of(base, tmp_path / f"{name}2")
