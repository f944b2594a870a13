"""CPI-FT's configs and stages: what is in scope, what stays frozen, what is held."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model

from peft_isolate import CoreIsolationConfig, HalfFTConfig, Region, next_stage, plan
from peft_isolate.deltas.adapters import regions_of
from peft_isolate.errors import FormatError, IsolateError, RegionError
from peft_isolate.methods.core_isolation import scope
from peft_isolate.regions import Selection, base_parameters, shapes_of
from tests.compare import adapter, assert_same, base, bits, logits
from tests.learn import dense, held, learn
from tests.models import CONFIGS, tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take")


def some(model, share: float = 0.02, seed: int = 0, names=None) -> Region:
    """A random core: so many scalars of every parameter in scope, in some of them none."""
    generator = torch.Generator().manual_seed(seed)
    shapes, chosen = shapes_of(model), {}
    for name in scope(model) if names is None else names:
        hit = (torch.rand(shapes[name], generator=generator) < share).flatten().nonzero().flatten()
        chosen[name] = Selection.elements(shapes[name], hit)
    return Region(chosen)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_in_scope_is_all_of_the_language_model_but_the_embeddings(architecture):
    """What learns as a probe: matrices, norms, biases; each parameter once; a core can be cut out of it."""
    model = tiny(architecture)
    names = scope(model)
    assert len(set(names)) == len(names)
    out = [name for name in base_parameters(model) if name not in names]
    words = ("embed", "wte", "wpe", "shared.weight", "lm_head", "vision", "multi_modal", "A_log", "mixer.D", "dt_bias")
    assert all(any(word in name for word in words) or name == "cls.predictions.bias" for name in out), out
    assert set(plan(model, CoreIsolationConfig()).region) == set(names)
    with_embeddings = scope(model, include_embeddings=True)
    assert [name for name in with_embeddings if name in names] == names
    assert len(with_embeddings) > len(names)
    wrapped = get_peft_model(copy.deepcopy(model), CoreIsolationConfig(frozen=some(model)))
    assert scope(wrapped) == names
    learn(wrapped, steps=1) if architecture not in ("t5", "bert", "gemma3_vision") else None


def test_the_pool_is_what_target_modules_names():
    model = tiny("llama")
    region = plan(
        model, CoreIsolationConfig(target_modules=["q_proj", "embed_tokens"], exclude_modules=r".*\.0\..*")
    ).region
    assert sorted(region) == [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
    ]
    layer = plan(model, CoreIsolationConfig(layers_to_transform=[1])).region
    assert {name.split(".")[2] for name in layer} == {"1"}
    assert not [name for name in plan(tiny("gpt2"), CoreIsolationConfig(train_bias=False)).region if "bias" in name]


@settings(max_examples=25, deadline=None)
@given(shares=st.lists(st.sampled_from([0.0, 0.01, 0.3, 1.0]), min_size=1, max_size=3), core=st.booleans())
def test_what_learns_is_the_scope_or_the_core_without_what_is_frozen(shares, core, tmp_path_factory):
    """Equal to sets of single positions; a file of a region is as good as the region."""
    model = tiny("llama")
    folder = tmp_path_factory.mktemp("regions")
    names = scope(model)
    frozen = [some(model, share, seed, names[seed::2]) for seed, share in enumerate(shares)]
    mine = some(model, 0.1, seed=9)
    given_as = []
    for number, region in enumerate(frozen):
        region.save(folder / f"{number}.safetensors")
        given_as.append(region if number % 2 else folder / f"{number}.safetensors")
    wanted = {}
    for name, shape in shapes_of(model).items():
        mask = torch.zeros(shape, dtype=torch.bool)
        if name in names:
            mask = (mine[name].mask() if name in mine else mask) if core else ~mask
        for region in frozen:
            if name in region:
                mask = mask & ~region[name].mask()
        if mask.any():
            wanted[name] = mask
    fields = {"train": "core", "core": mine} if core else {}
    if not wanted:
        return
    found = plan(model, CoreIsolationConfig(frozen=given_as, **fields)).region
    assert found.keys() == wanted.keys()
    for name, mask in wanted.items():
        assert torch.equal(found[name].mask(), mask), name


def train(model, steps: int, seed: int = 0, optimizer=torch.optim.AdamW) -> None:
    """What leaks through gradient masks: weight decay, momentum, clipping, accumulation over two batches."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    trainer = optimizer(learning, lr=5e-3, weight_decay=0.3, **options)
    for step in range(steps):
        for part in range(2):
            ids = tokens(seed=seed + 2 * step + part)
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(learning, 0.5)
        trainer.step()
        trainer.zero_grad()


def effective(model) -> dict[str, torch.Tensor]:
    """The weights that the model computes with: those of a merged copy."""
    merged = copy.deepcopy(model).merge_and_unload()
    return {name: parameter.detach().clone() for name, parameter in merged.named_parameters()}


@pytest.mark.parametrize(
    ("dtype", "optimizer"), [(torch.float32, torch.optim.SGD), (torch.bfloat16, torch.optim.AdamW)]
)
def test_what_is_frozen_keeps_its_bits(dtype, optimizer):
    """200 steps, and another frozen set half-way: no frozen scalar moves, off the base or off what is held."""
    model = tiny(dtype=dtype)
    first, second = some(model, 0.05, seed=1), some(model, 0.05, seed=2)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wrapped = get_peft_model(model, CoreIsolationConfig(frozen=first))
    train(wrapped, 100, optimizer=optimizer)
    middle = effective(wrapped)
    numbers = dense(wrapped)
    assert next_stage(wrapped, frozen=[first, second]) == Region(
        {name: ~s for name, s in (first | second).items()}
    ) | Region(
        {name: Selection.whole(shapes_of(wrapped)[name]) for name in scope(wrapped) if name not in first | second}
    )
    train(wrapped, 100, seed=500, optimizer=optimizer)
    end, after = effective(wrapped), dense(wrapped)
    moved = 0
    for name, was in start.items():
        mask = first[name].mask() if name in first else torch.zeros(was.shape, dtype=torch.bool)
        later = mask | (second[name].mask() if name in second else mask)
        assert torch.equal(bits(middle[name])[mask], bits(was)[mask]), name
        assert torch.equal(bits(end[name])[mask], bits(was)[mask]), name
        assert torch.equal(bits(end[name])[later], bits(middle[name])[later]), name
        if name in after:
            assert torch.equal(after[name][later], numbers[name][later]), name
            assert not after[name][mask].any()
            moved += int((after[name] != numbers[name]).sum())
    assert moved > 0.9 * (plan(wrapped, wrapped.peft_config["default"]).trained)
    found = base(wrapped)
    assert_same(found, {name: start[name] for name in found})


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gpt_neox"])
def test_next_stage_changes_no_number(architecture, tmp_path):
    """Same logits to the bit; what is frozen now is held; saved and loaded it goes on."""
    model = tiny(architecture)
    core = some(model, 0.1, seed=3)
    wrapped = learn(get_peft_model(model, CoreIsolationConfig()))
    before, numbers = logits(wrapped), dense(wrapped)
    trained = next_stage(wrapped, frozen=core)
    assert torch.equal(bits(logits(wrapped)), bits(before))
    assert_same(dense(wrapped), numbers)
    learns, kept = regions_of(wrapped, "default")
    assert (learns, kept) == (trained, core)
    assert wrapped.peft_config["default"].frozen == "stored"
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(architecture), tmp_path, is_trainable=True)
    assert torch.equal(bits(logits(loaded)), bits(before))
    assert next_stage(loaded, frozen=[]) == learns | core  # what was frozen learns again
    assert_same(dense(loaded), numbers)
    learn(loaded)
    name = next(iter(core))
    assert not torch.equal(dense(loaded)[name], numbers[name])


def test_a_core_alone_is_a_small_adapter():
    """Between the stages the rest of what was learned is held, and only the core learns."""
    model = tiny()
    core, frozen = some(model, 0.1, seed=4), some(model, 0.1, seed=5)
    wrapped = learn(get_peft_model(model, CoreIsolationConfig(train="core", core=core, frozen=frozen)))
    learns, kept = regions_of(wrapped, "default")
    assert (learns, kept.count) == (core - frozen, 0)
    assert {s.kind for s in learns.values()} == {"elements"}
    numbers = dense(wrapped)
    assert next_stage(wrapped, train="core", core=frozen, frozen=[]) == frozen
    assert regions_of(wrapped, "default")[1] == core - frozen
    kept_before = held(wrapped)
    learn(wrapped)
    assert_same(held(wrapped), kept_before)
    for name, was in numbers.items():
        mask = (core - frozen)[name].mask()
        assert torch.equal(dense(wrapped)[name][mask], was[mask])


def test_the_regions_are_consumed(tmp_path):
    """No path and no region is kept; a loaded config opens no file; another frozen set is next_stage's."""
    model = tiny()
    core = some(model)
    core.save(tmp_path / "core.safetensors")
    config = CoreIsolationConfig(frozen=str(tmp_path / "core.safetensors"))
    wrapped = learn(get_peft_model(model, config), steps=1)
    (tmp_path / "core.safetensors").unlink()
    wrapped.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert str(tmp_path) not in text
    said = json.loads(text)
    assert (said["frozen"], said["resolved"]["stored"]) == ("stored", {"frozen": [core.count]})
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    assert_same(adapter(loaded), adapter(wrapped))
    for fields, message in (
        ({"frozen": core}, "frozen is .* but the region in `resolved` was chosen with one of its own"),
        ({"frozen": ()}, "frozen is .* but the region in `resolved` was chosen with one of its own"),
        ({"train": "core", "core": core}, "train is 'core', but the region"),
    ):
        changed = PeftConfig.from_pretrained(tmp_path / "adapter")
        for name, value in fields.items():
            setattr(changed, name, value)
        with pytest.raises(RegionError, match=message):
            plan(tiny(), changed)
    with pytest.raises(IsolateError, match="frozen='stored' means what an adapter's file holds"):
        plan(tiny(), CoreIsolationConfig(frozen="stored"))
    said["frozen"] = ["/etc/hostname"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(FormatError, match=r"names the frozen .* which is not in the adapter"):
        PeftModel.from_pretrained(tiny(), tmp_path / "adapter")


def test_each_file_of_a_region_is_read_once(tmp_path, monkeypatch):
    """How large a region was is known from then on: a file that is gone before the model is wrapped is missed by
    nobody.
    """
    cores = {name: some(tiny(), 0.1 * n, seed=n) for n, name in enumerate("abc", 1)}
    a, b, c = (core.count for core in cores.values())
    load, read = Region.load, []

    def read_and_unlink(path):
        region = load(path)
        path.unlink()
        read.append(path.stem)
        return region

    monkeypatch.setattr(Region, "load", staticmethod(read_and_unlink))

    def file(name: str):
        cores[name].save(tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    def stored(adapter_name: str = "default") -> dict:
        return wrapped.peft_config[adapter_name].resolved["stored"]

    config = CoreIsolationConfig(train="core", core=file("a"), frozen=[file("b"), cores["c"]])
    wrapped = get_peft_model(tiny(), config)
    assert stored() == {"core": [a], "frozen": [b, c]}
    next_stage(wrapped, frozen=[file("c"), file("a")])
    assert stored() == {"frozen": [c, a]}
    next_stage(wrapped, train="core", core=file("b"), frozen=[])
    assert stored() == {"core": [b]}
    next_stage(wrapped, frozen=cores["a"])
    assert stored() == {"frozen": [a]}
    next_stage(wrapped, frozen=[])
    assert stored() == {}
    assert sorted(read) == ["a", "a", "b", "b", "c"]
    next_stage(wrapped, frozen=file("a"))
    wrapped.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    assert stored("sum") == {"frozen": [None]}  # of its own it has read none
    assert "counts" not in config.to_dict()


def test_with_nothing_frozen_it_says_so(caplog):
    model = tiny()
    assert "nothing is frozen: everything in scope learns" in str(plan(model, CoreIsolationConfig()))
    assert "nothing is frozen" not in str(plan(model, CoreIsolationConfig(frozen=some(model))))
    with caplog.at_level(logging.WARNING):
        get_peft_model(model, CoreIsolationConfig())
    assert "nothing is frozen" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": "all"}, r"train='all' is unknown: use one of \('complement', 'core'\)"),
        ({"train": "core"}, "needs to know which: pass core="),
        ({"core": Region()}, "core= has no effect with train='complement'"),
        ({"frozen": 5}, "frozen=5: give a region"),
        ({"frozen": {"a": 1}}, "give a region"),
        ({"frozen": [5]}, "frozen is or holds a int, which is no region"),
        ({"include_embeddings": 1}, "use True or False"),
        ({"include_embeddings": True, "target_modules": ["q_proj"]}, "include_embeddings=True has no effect"),
    ],
)
def test_a_config_that_means_nothing_is_refused(fields, message):
    with pytest.raises(IsolateError, match=message):
        CoreIsolationConfig(**fields)


def test_a_region_that_does_not_fit_is_refused(tmp_path):
    model = tiny()
    name = "model.layers.0.self_attn.q_proj.weight"
    for region, message in (
        (
            Region({name: Selection.whole((4, 4))}),
            rf"{name!r} has shape \(4, 4\) in the region and \(32, 32\) in this",
        ),
        (Region({"other": Selection.whole((4, 4))}), "names 'other' of shape .* which this model does not have"),
    ):
        for fields in ({"frozen": region}, {"train": "core", "core": region}):
            with pytest.raises(RegionError, match=message):
                plan(model, CoreIsolationConfig(**fields))
    with pytest.raises(IsolateError, match=r"frozen='nowhere': there is no such file; core_region"):
        plan(model, CoreIsolationConfig(frozen=["nowhere"]))
    with pytest.raises(
        RegionError, match=r"nothing is left to train: all 23,264 scalars of the complement are frozen"
    ):
        plan(model, CoreIsolationConfig(frozen=Region.whole(model)))
    embedding = Region({"model.embed_tokens.weight": Selection.rows((64, 32), [3])})
    with pytest.raises(RegionError, match=r"'model.embed_tokens.weight', which is not in scope"):
        plan(model, CoreIsolationConfig(train="core", core=embedding))
    config = CoreIsolationConfig(train="core", core=embedding, include_embeddings=True)
    assert plan(model, config).region == embedding
    plan(model, CoreIsolationConfig(frozen=embedding))  # it stays frozen in any case


def test_next_stage_refuses_other_models_and_changes_nothing():
    model = tiny()
    with pytest.raises(IsolateError, match="is no PeftModel with an adapter of this library"):
        next_stage(model, frozen=[])
    with pytest.raises(IsolateError, match="adapter of HalfFTConfig, which has no cores"):
        next_stage(get_peft_model(tiny(), HalfFTConfig()), frozen=[])
    wrapped = learn(get_peft_model(model, CoreIsolationConfig()))
    before, config = adapter(wrapped), wrapped.peft_config["default"]
    with pytest.raises(IsolateError, match="no adapter 'other'"):
        next_stage(wrapped, adapter_name="other", frozen=[])
    with pytest.raises(RegionError, match="nothing is left to train"):
        next_stage(wrapped, frozen=Region.whole(wrapped))
    assert_same(adapter(wrapped), before)
    assert wrapped.peft_config["default"] is config
