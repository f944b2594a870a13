"""Anchor text: a function of the config and the step, cut among processes, sampled from the reference and kept."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import GenerationConfig

from peft_isolate import HalfFTConfig
from peft_isolate.deltas.reference import Reference
from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.evaluation.rows import encode
from peft_isolate.training.anchor.config import AnchorConfig
from peft_isolate.training.anchor.text import AnchorText, anchor_text
from tests.compare import assert_same, bits
from tests.models import tiny
from tests.texts import chat_rows, sft_rows, tokenizer
from tests.training.distributed_worker import pair

WORDS = [{"text": word} for word in ("sun", "moon and stars", "a", "tree", "the river")]
OWN_WORDS = AnchorConfig(source="self", max_length=10, n_rows=40, batch_size=4)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    made = tiny()
    with torch.no_grad():  # weights of an ordinary size: otherwise every token is about as likely
        for parameter in made.parameters():
            parameter.mul_(6) if parameter.ndim == 2 else None
    return made


def beginning() -> object:
    """A tokenizer that puts its first token before a text, and its last one behind."""
    made = tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


def rows_of(text: AnchorText, step: int, world_size: int = 1) -> list[list[int]]:
    """The real tokens of a whole anchored step."""
    found = []
    for rank in range(world_size):
        batch = text.batch(step, rank, world_size)
        found += [ids[mask.bool()].tolist() for ids, mask in zip(*batch.values(), strict=True)]
    return found


def sources(model: nn.Module) -> dict[str, object]:
    return {
        name: anchor_text(AnchorConfig(source=source, max_length=9, n_rows=7, batch_size=4), model, tokenizer())
        for name, source in {"random": "random", "self": "self", "rows": WORDS}.items()
    }


@pytest.fixture(scope="module")
def texts(model) -> dict[str, AnchorText]:
    return sources(model)


@pytest.mark.parametrize("source", ["random", "self", "rows"])
def test_two_processes_have_the_rows_of_one_with_twice_as_many(texts, model, source):
    """Bit for bit, padding too, at every step; and each process can tell the number of scored tokens of all."""
    small = texts[source]
    large = AnchorText(AnchorConfig(**vars(small.config) | {"batch_size": 8}), small._rows)
    for step in (0, 1, 5):
        parts = [small.batch(step, rank, 2) for rank in range(2)]
        whole = large.batch(step)
        assert_same({name: torch.cat([part[name] for part in parts]) for name in whole}, whole)
        assert whole["input_ids"].dtype == whole["attention_mask"].dtype == torch.int64
        scored = int(whole["attention_mask"][:, 1:].sum())
        assert small.global_tokens(step, 2) == large.global_tokens(step) == scored > 0
        assert whole["attention_mask"].any(0).all()  # not wider than the longest row


def test_all_processes_pad_to_one_width():
    """That of the longest row of them all: so each has the very tensors that are its part of the whole."""
    text = anchor_text(AnchorConfig(source=WORDS, batch_size=1), _tiny(), tokenizer())
    batches = [text.batch(0, rank, 5) for rank in range(5)]
    assert {batch["input_ids"].shape for batch in batches} == {(1, 1 + max(len(row["text"]) for row in WORDS))}
    assert len({int(batch["attention_mask"].sum()) for batch in batches}) == 5


@pytest.mark.parametrize("source", ["random", "self", "rows"])
def test_a_batch_depends_on_nothing_that_came_before(texts, model, source):
    """Steps in any order, a text made anew, other random states: the same bits. So nothing is lost by a break."""
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    fresh = sources(model)[source]
    backwards = {step: fresh.batch(step) for step in (9, 3, 0)}
    for step in (0, 3, 9):
        assert_same(backwards[step], texts[source].batch(step))
    assert fresh.digest() == texts[source].digest()
    assert len({str(rows_of(fresh, step)) for step in range(3)}) == 3


@given(
    n_rows=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=40, deadline=None)
def test_rows_are_walked_through_again_and_again(n_rows, batch_size, world_size, seed):
    """However the stream is cut into steps, each n rows of it are all n rows once; each time in another order."""
    rows = [{"text": chr(97 + i) * (i + 1)} for i in range(n_rows)]
    config = AnchorConfig(source=rows, batch_size=batch_size, seed=seed)
    text = anchor_text(config, _tiny(), tokenizer())
    steps = -(-4 * n_rows // (batch_size * world_size))
    stream = [tuple(row) for step in range(steps) for row in rows_of(text, step, world_size)]
    times = [stream[i * n_rows : (i + 1) * n_rows] for i in range(4)]
    assert all(Counter(time) == Counter(times[0]) for time in times)
    assert set(times[0]) == {tuple(row.ids) for row in encode(rows, tokenizer())}
    if n_rows > 8:
        assert len(set(map(tuple, times))) == 4


def _tiny(cache: list[nn.Module] = []) -> nn.Module:  # noqa: B006
    if not cache:
        cache.append(tiny())
    return cache[0]


def test_rows_are_ordered_by_the_seed():
    """Another seed, another order, of the same rows."""
    orders = [rows_of(anchor_text(AnchorConfig(sft_rows(20), seed=s, batch_size=20), _tiny(), tokenizer()), 0)
              for s in range(2)]  # fmt: skip
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize("rows", [WORDS[:2], sft_rows(6), chat_rows(6)], ids=["text", "prompt", "messages"])
def test_text_of_the_users_is_what_a_trainer_would_train_on(rows, tmp_path):
    """All tokens of a row, prompts too, up to max_length; from a file as from a list."""
    path = tmp_path / "old.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = AnchorConfig(source=path, batch_size=len(rows), max_length=8)
    text = anchor_text(config, _tiny(), tokenizer())
    assert sorted(rows_of(text, 0)) == sorted(row.ids for row in encode(rows, tokenizer(), 8))
    assert max(map(len, rows_of(text, 0))) == 8 or "text" in rows[0]
    assert anchor_text(AnchorConfig(source=rows, max_length=8), _tiny(), tokenizer()).digest() == text.digest()


def test_rows_that_score_nothing_are_left_out():
    """A row of one token has no token that is predicted."""
    made = tokenizer()
    made.eos_token = None
    text = anchor_text(
        AnchorConfig(source=[{"text": "a"}, {"text": ""}, {"text": "sun"}], batch_size=3), _tiny(), made
    )
    assert {tuple(row) for row in rows_of(text, 0)} == {tuple(made("sun")["input_ids"])}


def test_random_text_is_uniform_over_ordinary_tokens():
    """Every token that stands for text comes equally often, a special one never; as long as asked for."""
    made = tokenizer()
    made.add_tokens(["<one>"], special_tokens=True)  # special, and not by one of the usual names
    extra = made.convert_tokens_to_ids("<one>")
    assert extra < 64
    text = anchor_text(AnchorConfig(max_length=50, batch_size=400), _tiny(), made)
    batch = text.batch(3)
    assert batch["input_ids"].shape == (400, 50)
    assert batch["attention_mask"].all()
    counts = torch.bincount(batch["input_ids"].flatten(), minlength=64)
    wanted = [i for i in range(len(made)) if i not in {0, 1, 2, 3, extra}]
    assert counts.nonzero().flatten().tolist() == wanted
    expected = 400 * 50 / len(wanted)
    # χ² of n - 1 degrees of freedom: beyond its mean by six of its standard deviations in no fair draw.
    assert ((counts[wanted] - expected) ** 2 / expected).sum() < len(wanted) + 6 * (2 * len(wanted)) ** 0.5
    again = anchor_text(AnchorConfig(max_length=50, batch_size=400, seed=1), _tiny(), made).batch(3)
    assert (again["input_ids"] == batch["input_ids"]).float().mean() < 0.05


def test_random_text_is_the_same_in_every_version():
    """The very tokens: a run that goes on after an update of torch or NumPy must find its anchor again."""
    text = anchor_text(AnchorConfig(max_length=8, batch_size=2, seed=5), _tiny(), tokenizer())
    wanted = [[14, 40, 39, 4, 27, 42, 43, 5], [47, 5, 53, 58, 35, 16, 48, 53]]
    assert text.batch(2)["input_ids"].tolist() == wanted


def test_text_begins_as_the_tokenizer_begins_one(model):
    """With the token that it puts in front, and only there; random and sampled text alike."""
    for source in ("random", "self"):
        config = AnchorConfig(source=source, max_length=6, n_rows=20, batch_size=20)
        ids = anchor_text(config, model, beginning()).batch(0)["input_ids"]
        assert (ids[:, 0] == 1).all()
        plain = anchor_text(config, model, tokenizer()).batch(0)["input_ids"]
        assert not (plain[:, 0] == 1).any()
        assert len(plain[:, 0].unique()) > 5
    assert not (ids == 2).all(1).any()


def test_without_a_tokenizer_the_models_config_says(model):
    """Its vocabulary, its first token; what it calls special is left out."""
    ids = anchor_text(AnchorConfig(max_length=30, batch_size=100), model).batch(0)["input_ids"]
    assert (ids[:, 0] == 1).all()
    assert set(ids[:, 1:].flatten().tolist()) == set(range(3, 64))


def test_a_vocabulary_larger_than_the_tokenizers_is_not_used_up(model):
    """Rows of the embedding that no token has were never trained; and a tokenizer may have tokens the model lacks."""
    large = tiny(vocab_size=80)
    ids = anchor_text(AnchorConfig(max_length=40, batch_size=100), large, tokenizer()).batch(0)["input_ids"]
    assert int(ids.max()) == len(tokenizer()) - 1
    small = tiny(vocab_size=20)
    ids = anchor_text(AnchorConfig(max_length=40, batch_size=100), small, tokenizer()).batch(0)["input_ids"]
    assert int(ids.max()) == 19


def twin_sampled(model: nn.Module, config: AnchorConfig, prompts: torch.Tensor, at_once: int) -> list[list[int]]:
    """One token at a time, each computed anew without a cache; torch's own draws, in the order of `generate`."""
    torch.manual_seed(config.seed)
    rows = []
    for part in prompts.split(at_once):
        ids, ended = part, torch.zeros(len(part), dtype=torch.bool)
        for _ in range(config.max_length - prompts.shape[1]):
            if ended.all():
                break
            with torch.no_grad():
                logits = model.eval()(input_ids=ids).logits[:, -1].float()
            drawn = torch.multinomial(torch.softmax(logits / config.temperature, -1), 1)
            ids = torch.cat([ids, torch.where(ended[:, None], 0, drawn)], 1)
            ended |= drawn[:, 0] == 2
        for row in ids.tolist():
            ends = [i for i, token in enumerate(row) if token == 2 and i >= prompts.shape[1]]
            rows.append(row[: ends[0] + 1] if ends else row)
    return rows


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_reference_writes_by_plain_sampling(model, temperature):
    """As a loop without cache draws: no top-k, no nucleus, no penalty, whatever the model's own settings say."""
    config = AnchorConfig(**vars(OWN_WORDS) | {"temperature": temperature, "batch_size": 40, "seed": 3})
    model.generation_config = GenerationConfig(
        top_k=2, top_p=0.1, repetition_penalty=3.0, max_new_tokens=2, eos_token_id=[2], bad_words_ids=[[5]],
        min_new_tokens=5, suppress_tokens=[7],
    )  # fmt: skip
    try:
        text = anchor_text(config, model)
    finally:
        model.generation_config = GenerationConfig(eos_token_id=2)
    prompts = torch.ones(40, 1, dtype=torch.int64)
    wanted = twin_sampled(model, config, prompts, 32)
    assert sorted(rows_of(text, 0)) == sorted(wanted)
    assert len({len(row) for row in wanted}) > 2  # some ended early


@pytest.mark.parametrize("who", ["config", "generation_config", "tokenizer"])
def test_whoever_names_what_ends_a_text_is_heard(who):
    """A row ends with the first such token, which is its last: the config's, one of several, the tokenizer's."""
    made = tiny(eos_token_id=2 if who == "config" else None)
    made.generation_config = GenerationConfig(eos_token_id=[2, 5] if who == "generation_config" else None)
    config = AnchorConfig("self", max_length=60, n_rows=40, batch_size=40)
    rows = rows_of(anchor_text(config, made, tokenizer() if who == "tokenizer" else None), 0)
    ends = {2, 5} if who == "generation_config" else {2}
    assert any(len(row) < 60 for row in rows)
    for row in rows:
        assert not ends & set(row[1:-1])
        assert len(row) == 60 or row[-1] in ends


def test_sampling_leaves_the_model_as_it_was(model):
    """Modes, settings, random states, gradients, what learns: untouched, also where sampling fails."""
    wrapped = get_peft_model(tiny(attention_dropout=0.5), HalfFTConfig())
    wrapped.train()
    wrapped.get_base_model().model.layers[0].eval()
    wrapped.config.use_cache = False
    inner = wrapped.get_base_model()
    modes = [module.training for module in wrapped.modules()]
    learns = [parameter.requires_grad for parameter in wrapped.parameters()]
    settings_before = inner.generation_config
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    anchor_text(OWN_WORDS, wrapped, tokenizer())
    with torch.no_grad():
        inner.lm_head.weight[0] = torch.nan
    with pytest.raises(IsolateError, match="not finite"):
        anchor_text(OWN_WORDS, wrapped, tokenizer())
    assert modes == [module.training for module in wrapped.modules()]
    assert learns == [parameter.requires_grad for parameter in wrapped.parameters()]
    assert inner.generation_config is settings_before
    assert not inner.config.use_cache
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(parameter.grad is None for parameter in wrapped.parameters())


@pytest.mark.parametrize("method", ["hft", "lora"])
def test_it_is_the_reference_that_writes(model, method):
    """Not the model as it is by now: an adapter that was fresh is left out, one that was trained stays in."""
    made = tiny(seed=1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(6) if parameter.ndim == 2 else None
    of_base = anchor_text(OWN_WORDS, made).digest()
    config = HalfFTConfig() if method == "hft" else LoraConfig(target_modules=["q_proj", "up_proj"])
    wrapped = get_peft_model(made, config)
    fresh = Reference.now(wrapped)
    assert anchor_text(OWN_WORDS, wrapped).digest() == of_base
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3) if parameter.requires_grad else None
    trained = Reference.now(wrapped)
    assert anchor_text(OWN_WORDS, wrapped, reference=fresh).digest() == of_base
    of_trained = anchor_text(OWN_WORDS, wrapped, reference=trained).digest()
    assert of_trained == anchor_text(OWN_WORDS, wrapped).digest() != of_base
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.zero_() if parameter.requires_grad else None
    before = {name: bits(parameter) for name, parameter in wrapped.named_parameters()}
    assert anchor_text(OWN_WORDS, wrapped, reference=trained).digest() == of_trained
    assert all(torch.equal(bits(parameter), before[name]) for name, parameter in wrapped.named_parameters())


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "mixtral", "mamba", "gemma3_vision"])
def test_many_architectures_write(architecture):
    """Whatever caches keys and values, states or windows."""
    text = anchor_text(AnchorConfig("self", max_length=8, n_rows=3), tiny(architecture), tokenizer())
    assert all(2 <= len(row) <= 8 for row in rows_of(text, 0))


def test_what_was_sampled_is_kept(model, tmp_path):
    """Bit for bit, with what it depends on; how it is used may differ, how it was sampled may not."""
    reference = Reference.now(model)
    config = AnchorConfig(**vars(OWN_WORDS) | {"temperature": 0.7, "seed": 11})
    text = anchor_text(config, model, tokenizer(), reference)
    text.save(tmp_path / "new folder" / "anchor.safetensors")
    path = tmp_path / "new folder" / "anchor.safetensors"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    again = AnchorText.load(path)
    assert again.digest() == text.digest()
    assert (again.config.temperature, again.config.seed, again.config.n_rows) == (0.7, 11, 40)
    used = AnchorConfig(**vars(config) | {"batch_size": 3, "beta": 0.1, "every": 4})
    other = AnchorText.load(path, used, reference)
    assert other.config == used
    assert rows_of(other, 0) == rows_of(text, 0)[:3]
    for name, value in {"temperature": 0.8, "seed": 12, "n_rows": 41, "max_length": 11, "source": "random"}.items():
        changed = AnchorConfig(**vars(config) | {name: value})
        with pytest.raises(IsolateError, match=f"sampled with {name}=.*{name}={value!r} is asked for"):
            AnchorText.load(path, changed)
    wrapped = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(IsolateError, match="sampled from another reference"):
        AnchorText.load(path, config, Reference.now(wrapped))
    again.save(path)
    assert AnchorText.load(path, config, reference).digest() == text.digest()  # the reference is kept, too


def altered(path: Path, what: str) -> None:
    """Make a file of anchor text wrong in one way."""
    tensors = load_file(path)
    config = {name: getattr(OWN_WORDS, name) for name in ("seed", "temperature", "max_length", "n_rows")}
    about = {"format": "peft_isolate.anchor/1", "reference": "", "config": json.dumps(config)}
    ids, lengths = tensors["ids"], tensors["lengths"]
    if what == "format":
        about["format"] = "peft_isolate.region/1"
    elif what == "config":
        about["config"] = '{"seed": "x"}'
    elif what == "no reference":
        del about["reference"]
    elif what == "negative":
        ids[3] = -1
    elif what == "float":
        tensors["ids"] = ids.float()
    elif what == "short":
        tensors["ids"] = ids[:-1].clone()
    elif what == "lengths":
        tensors["ids"] = ids[int(lengths[0]) - 1 :].clone()
        lengths[0] = 1
    elif what == "long":
        lengths[:] = 2
        lengths[0] += len(ids) - int(lengths.sum())
    elif what == "rows":
        tensors["lengths"] = torch.cat([lengths[:-2], lengths[-2:].sum()[None]])
    elif what == "none":
        tensors["ids"], tensors["lengths"] = ids[:0].clone(), lengths[:0].clone()
    elif what == "matrix":
        tensors["lengths"] = lengths[None].clone()
    save_file(tensors, path, about)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    "what",
    ["format", "config", "no reference", "negative", "float", "short", "lengths", "long", "rows", "none", "matrix",
     "cut"],
)  # fmt: skip
def test_an_altered_file_is_refused(model, tmp_path, what):
    """Another file, a truncated one, tensors that do not fit: a FormatError that names the file."""
    path = tmp_path / "anchor.safetensors"
    anchor_text(OWN_WORDS, model).save(path)
    altered(path, "nothing")
    assert AnchorText.load(path, OWN_WORDS).digest()
    altered(path, what)
    with pytest.raises(FormatError, match=r"anchor\.safetensors' is not a readable anchor text"):
        AnchorText.load(path)


def test_there_is_nothing_to_keep_of_other_text(model, tmp_path):
    """Random tokens and text of the user's are made anew."""
    for source in ("random", WORDS):
        with pytest.raises(IsolateError, match='only text of source="self" is kept'):
            anchor_text(AnchorConfig(source=source, max_length=8), model, tokenizer()).save(tmp_path / "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(IsolateError, match="there is no such file"):
        AnchorText.load(tmp_path / "x")


def tiny_with(**config) -> nn.Module:
    made = tiny()
    for name, value in config.items():
        setattr(made.config, name, value)
    return made


@pytest.mark.parametrize(
    ("config", "model", "made", "message"),
    [
        ({}, tiny("t5"), None, "T5ForConditionalGeneration has an encoder"),
        ({"source": "self"}, tiny("bert"), None, "BertForMaskedLM cannot generate"),
        ({}, nn.Linear(2, 2), None, "Linear has no input embedding"),
        ({"max_length": 65}, tiny(), None, "rows of 65 tokens do not fit .* 64 positions: use max_length=64"),
        ({"source": "self", "max_length": 65}, tiny(), None, "rows of 65 tokens do not fit"),
        ({"source": [{"text": "sun" * 40}], "max_length": 256}, tiny(), tokenizer(), "rows of 121 tokens do not fit"),
        ({"source": WORDS}, tiny(), None, "there is no tokenizer"),
        ({"source": WORDS}, tiny(vocab_size=20), tokenizer(), "the id 40, and the model knows 20 tokens"),
        ({"source": [{"words": "sun"}]}, tiny(), tokenizer(), "row 0 has the fields"),
        ({"source": [{"text": "sun"}, "moon"]}, tiny(), tokenizer(), "row 1 is str"),
        ({"source": [{"text": ""}]}, tiny(vocab_size=70), tokenizer(), "no token of 1 rows can be scored"),
        ({}, tiny(vocab_size=3), tokenizer(), "all of the 3 tokens .* are special"),
    ],
)  # fmt: skip
def test_what_cannot_be_anchored_on_is_refused(config, model, made, message):
    """The value, the reason, the remedy."""
    with pytest.raises(IsolateError, match=message):
        anchor_text(AnchorConfig(**{"max_length": 60} | config), model, made)


def test_steps_and_processes_that_are_none_are_refused(texts):
    """Counted from 0 on."""
    for arguments in ((-1,), (0, 2, 2), (0, -1, 2), (0, 0, 0)):
        with pytest.raises(IsolateError, match=r"step=|rank="):
            texts["random"].batch(*arguments)
    for step in (-1, 1.5, True):
        with pytest.raises(IsolateError, match=f"step={step}.*use whole numbers"):
            texts["random"].global_tokens(step)
    for arguments in ((1.5,), (True,), (0, 0, 1.5), (0, 0, True), (0, 0.5, 2), (0, False)):
        with pytest.raises(IsolateError, match=r"use whole numbers|rank="):
            texts["random"].batch(*arguments)


def test_a_model_in_wrappers_is_asked_inside(model):
    """PEFT around it, and a processor around the tokenizer, change nothing."""

    class Processor:
        tokenizer = tokenizer()

    wanted = anchor_text(OWN_WORDS, model, tokenizer()).digest()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert anchor_text(OWN_WORDS, wrapped, Processor()).digest() == wanted
    wrapped.unload()


@pytest.mark.slow
def test_one_process_writes_for_all(tmp_path):
    """The others get its rows, bit for bit, whatever their model would write; where it fails, all of them do."""
    config = {"source": "self", "max_length": 10, "n_rows": 40, "batch_size": 4}
    jobs = [("written", {"config": config}), *(("written", {"config": config, "broken": rank}) for rank in range(2))]
    sound, failed, unasked = pair(jobs, tmp_path, module="tests.training.anchor_text_worker")
    alone = anchor_text(AnchorConfig(**config), tiny(seed=0))
    for rank in range(2):
        digest, batches = sound[rank]
        assert digest == alone.digest() == unasked[rank][0]
        for step, batch in enumerate(batches):
            assert_same(batch, alone.batch(step, rank, 2))
        assert isinstance(failed[rank], IsolateError)
        assert "not finite" in str(failed[rank])
    assert "the first process, which makes the anchor text for all, could not" in str(failed[1])


def test_a_sharded_model_is_not_sampled_from(model):
    """One process alone would wait for the others' shards: refused before anything waits."""
    sharded = tiny()
    sharded.lm_head.weight.ds_id = 0  # as ZeRO-3 marks what it partitions
    with pytest.raises(IsolateError, match="the model is sharded"):
        anchor_text(OWN_WORDS, sharded, reference=Reference.base(model))
