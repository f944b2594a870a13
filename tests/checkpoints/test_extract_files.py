"""What `extract` refuses, and however its two checkpoints lie on the disk."""

from __future__ import annotations

import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from peft_isolate import HalfFTConfig
from peft_isolate.checkpoints.extract import extract
from peft_isolate.checkpoints.memory import Checkpoint
from peft_isolate.checkpoints.merge import merge
from peft_isolate.checkpoints.shards import SINGLE
from peft_isolate.deltas.adapters import parameter_deltas
from peft_isolate.errors import BaseMismatchError, IsolateError, RegionError
from peft_isolate.regions import base_parameters
from tests.checkpoints.folders import files, load, saved, tensors
from tests.checkpoints.tunings import NESTED, UP, assert_merges, everything, in_memory, of_layers, tuned
from tests.compare import assert_same
from tests.learn import filled
from tests.models import AUTO_CLASSES, CONFIGS, tokens

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:Could not find a config file")

# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("mode", ["region", "top"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["base", "tuned"])
def test_numbers_that_are_none(mode, value, where, tmp_path):
    """Refused, naming the tensor."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned", everything)
    model = tensors(tmp_path / where)
    model[UP][3, 4] = value
    save_file(model, tmp_path / where / SINGLE, metadata={"format": "pt"})
    with pytest.raises(RegionError, match=rf"'{UP}' h(as|olds) NaN or infinity"):
        extract(base, theirs, tmp_path / "adapter", mode=mode)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("mode", ["region", "top"])
def test_another_model_is_refused_by_name_and_shapes(mode, tmp_path):
    """A grown vocabulary, a head that is gone, a tensor that is new; all of them an exact difference carries."""
    base = saved(tmp_path / "base")
    grown = saved(tmp_path / "grown", vocab_size=70)
    with pytest.raises(
        RegionError, match=r"embed_tokens.weight' is \(64, 32\) in the base and \(70, 32\) in the tuned"
    ):
        extract(base, grown, tmp_path / "out", mode=mode)
    model = tensors(base)
    for name, change in (
        ("gone", lambda: model.pop(UP)),
        ("new", lambda: model.update({UP: torch.zeros(48, 32), "model.layers.1.extra": torch.zeros(7)})),
    ):
        folder = saved(tmp_path / name)
        change()
        save_file(model, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(RegionError, match=r"up_proj.weight' of shape \(48, 32\) is only in the base"):
        extract(base, tmp_path / "gone", tmp_path / "out", mode=mode)
    with pytest.raises(RegionError, match=r"up_proj.weight' of shape \(48, 32\) is only in the tuned"):
        extract(tmp_path / "gone", base, tmp_path / "out", mode=mode)
    with pytest.raises(RegionError, match=r"extra' of shape \(7,\) is only in the tuned checkpoint"):
        extract(base, tmp_path / "new", tmp_path / "out", mode=mode)
    for name in ("grown", "gone", "new"):
        extract(base, tmp_path / name, tmp_path / f"exact-{name}", mode="exact")
        merge(base, tmp_path / f"exact-{name}", out=tmp_path / f"merged-{name}")
        assert files(tmp_path / f"merged-{name}") == files(tmp_path / name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["gemma2", "bert", "t5"])
def test_tied_tensors(architecture, tmp_path):
    """No delta is put on one of two names; without embeddings the rest becomes an adapter, and that is said."""
    config = {"tie_word_embeddings": True}
    base = saved(tmp_path / "base", architecture, **config)
    theirs = tuned(tmp_path / "tuned", everything, architecture, **config)
    with pytest.raises(RegionError, match=r"is tied to .* include_embeddings=False"):
        extract(base, theirs, tmp_path / "adapter")
    result = extract(base, theirs, tmp_path / "adapter", include_embeddings=False)
    assert result.left_out
    assert "left out, though different: " in str(result)
    assert_merges(base, tmp_path / "adapter", tmp_path / "out", architecture)


@pytest.mark.parametrize("architecture", NESTED)
def test_an_adapter_that_could_not_be_loaded_is_not_made(architecture, tmp_path):
    """Parameters of a module and of one inside it; of either alone it is."""

    def inner(parameters) -> None:
        everything({name: p for name, p in parameters.items() if name.endswith(("proj.weight", "norm.weight"))})

    base = saved(tmp_path / "base", architecture)
    theirs = tuned(tmp_path / "tuned", everything, architecture)
    with pytest.raises(RegionError, match=r"lie inside one another.* mode='exact' carries all"):
        extract(base, theirs, tmp_path / "adapter", include_embeddings=False)
    assert not (tmp_path / "adapter").exists()
    extract(base, tuned(tmp_path / "other", inner, architecture), tmp_path / "adapter")
    assert_merges(base, tmp_path / "adapter", tmp_path / "out", architecture)


def test_out_is_looked_at_first(tmp_path):
    """Hours of work are not thrown away at the end."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    for mode in ("region", "top", "exact"):
        with pytest.raises(IsolateError, match="is there already"):
            extract("nowhere/base", "nowhere/tuned", tmp_path / "out", mode=mode)
    with pytest.raises(IsolateError, match="is there already"):
        merge("nowhere/base", "nowhere/adapter", out=tmp_path / "out")


# ---------------------------------------------------------------------------------------------- how they are stored


@pytest.mark.parametrize("mode", ["region", "top"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "bert"])
def test_stored_without_the_models_prefix(architecture, mode, tmp_path):
    """As the headless model saves itself; on either side."""
    base = saved(tmp_path / "base", architecture)
    theirs = tuned(tmp_path / "tuned", of_layers, architecture)
    wanted = extract(base, theirs, tmp_path / "wanted", mode=mode)
    model = AUTO_CLASSES.get(architecture, None)
    prefix = "bert." if model else "model."
    found = tensors(theirs)
    save_file({n.removeprefix(prefix): t for n, t in found.items()}, theirs / SINGLE, metadata={"format": "pt"})
    result = extract(base, theirs, tmp_path / "adapter", mode=mode)
    assert result.scalars == wanted.scalars
    assert (
        files(tmp_path / "adapter")["adapter_model.safetensors"]
        == files(tmp_path / "wanted")["adapter_model.safetensors"]
    )
    stripped = {n.removeprefix(prefix): t for n, t in tensors(base).items()}
    save_file(stripped, base / SINGLE, metadata={"format": "pt"})
    merge(base, tmp_path / "adapter", out=tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == stripped.keys()
    assert_same(
        in_memory(tmp_path / "out", architecture),
        dict(
            base_parameters(
                PeftModel.from_pretrained(load(base, architecture), tmp_path / "adapter").merge_and_unload()
            )
        ),
    )


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_an_adapter_of_the_headless_model(architecture, tmp_path):
    """Whose parameters have no prefix in memory merges into the whole model's files, also those that are converted."""
    from peft import get_peft_model
    from transformers import AutoModel

    base = saved(tmp_path / "base", architecture)
    model = filled(get_peft_model(AutoModel.from_pretrained(base, dtype="auto"), HalfFTConfig()))
    model.save_pretrained(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", out=tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(base).keys()
    merged = AutoModel.from_pretrained(tmp_path / "out", dtype="auto")
    assert_same(dict(merged.named_parameters()), dict(model.merge_and_unload().named_parameters()))


def test_the_disk_has_the_second_of_two_tied_names(tmp_path):
    """Read, merged and tied all the same."""
    base = saved(tmp_path / "base", tie_word_embeddings=True)
    model = tensors(base)
    model["lm_head.weight"] = model.pop("model.embed_tokens.weight")
    save_file(model, base / SINGLE, metadata={"format": "pt"})
    assert torch.equal(Checkpoint(base).read("model.embed_tokens.weight"), model["lm_head.weight"])
    theirs = tuned(tmp_path / "tuned", of_layers, tie_word_embeddings=True)
    extract(base, theirs, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", out=tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == model.keys()
    merged = load(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(merged.lm_head.weight, model["lm_head.weight"])


def test_both_of_two_tied_names_on_the_disk(tmp_path):
    """As older models lie: a copy of each."""
    base = saved(tmp_path / "base", tie_word_embeddings=True)
    model = tensors(base)
    model["lm_head.weight"] = model["model.embed_tokens.weight"].clone()
    save_file(model, base / SINGLE, metadata={"format": "pt"})
    theirs = tuned(tmp_path / "tuned", of_layers, tie_word_embeddings=True)
    extract(base, theirs, tmp_path / "adapter")
    assert_merges(base, tmp_path / "adapter", tmp_path / "out")


def test_buffers_that_differ_are_named(tmp_path):
    """No adapter changes them."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned", of_layers)
    for folder, value in ((base, 0), (theirs, 1)):
        model = tensors(folder) | {"model.same": torch.ones(2), "model.steps": torch.tensor([value])}
        save_file(model, folder / SINGLE, metadata={"format": "pt"})
    assert extract(base, theirs, tmp_path / "adapter").left_out == ("model.steps",)


def test_a_classifier_of_the_same_class(tmp_path):
    """The class is the one that the base's config names."""
    from transformers import AutoModelForSequenceClassification

    base = tmp_path / "base"
    model = AutoModelForSequenceClassification.from_config(CONFIGS["llama"](num_labels=3))
    model.save_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1
        model.score.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    result = extract(base, tmp_path / "tuned", tmp_path / "adapter")
    assert result.tensors == 2
    merge(base, tmp_path / "adapter", out=tmp_path / "out")
    loaded = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "adapter"
    ).merge_and_unload()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(merged(tokens()).logits, loaded(tokens()).logits)


def test_the_same_adapter_twice(tmp_path):
    """Is twice the difference, in one expression."""
    base = saved(tmp_path / "base")
    extract(base, tuned(tmp_path / "tuned", of_layers), tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "adapter", out=tmp_path / "out")
    delta = {
        n: d.dense()
        for n, d in parameter_deltas(PeftModel.from_pretrained(load(base), tmp_path / "adapter"), "default").items()
    }
    before, after = tensors(base), tensors(tmp_path / "out")
    assert all(torch.equal(after[name], before[name] + dense + dense) for name, dense in delta.items())


def test_another_base_is_refused(tmp_path):
    """The adapter carries its base's fingerprint, like one that was trained."""
    base, other = saved(tmp_path / "base"), saved(tmp_path / "other")
    extract(base, tuned(tmp_path / "tuned", of_layers), tmp_path / "adapter")
    save_file({n: t + 0.1 for n, t in tensors(other).items()}, other / SINGLE, metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match=r"'model\.embed_tokens\.weight'"):
        merge(other, tmp_path / "adapter", out=tmp_path / "out")
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(load(other), tmp_path / "adapter")


@pytest.mark.parametrize("sizes", [("20KB", "5GB"), ("5GB", "20KB")])
def test_shards_and_read_only_folders(sizes, tmp_path):
    """Sharded or not, on either side; a base that nobody may write to, through links as in the Hub's cache."""
    base = saved(tmp_path / "base", "qwen3_moe", torch.bfloat16, max_shard_size=sizes[0])
    theirs = tuned(tmp_path / "tuned", everything, "qwen3_moe", torch.bfloat16, max_shard_size=sizes[1])
    link = tmp_path / "snapshot"
    link.mkdir()
    for path in base.iterdir():
        path.chmod(0o444)
        (link / path.name).symlink_to(path)
    extract(f"{link}/", theirs, tmp_path / "adapter")
    merge(link, tmp_path / "adapter", out=tmp_path / "out")
    assert files(tmp_path / "out").keys() == files(base).keys()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert_merges(base, tmp_path / "adapter", tmp_path / "again", "qwen3_moe")
    assert files(tmp_path / "again") == files(tmp_path / "out")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["extract", "merge"])
def test_interrupted(when, error, tmp_path, monkeypatch):
    """Nothing is left of what was begun."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned", of_layers)
    extract(base, theirs, tmp_path / "adapter")
    function, name = {"extract": (extract, "_unequal"), "merge": (merge, "compose_in_place")}[when]
    module = sys.modules[function.__module__]
    calls = []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return real(*args, **kwargs)

    real = getattr(module, name)
    monkeypatch.setattr(module, name, fails)
    run = {
        "extract": lambda: extract(base, theirs, tmp_path / "out"),
        "merge": lambda: merge(base, tmp_path / "adapter", out=tmp_path / "out"),
    }[when]
    with pytest.raises(error):
        run()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "adapter"}
