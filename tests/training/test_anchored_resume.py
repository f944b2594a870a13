"""A checkpoint tells what its run was anchored to: the same anchor goes on bit for bit, another is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from peft import get_peft_model
from trl import SFTConfig, SFTTrainer

from peft_isolate import HalfFTConfig
from peft_isolate.deltas.reference import Reference
from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.training.anchor import AnchoredSFTTrainer, AnchorText, anchor_text
from peft_isolate.training.anchor.record import Record, check_resumed
from tests.compare import adapter, assert_same
from tests.models import tiny
from tests.texts import sft_rows, tokenizer
from tests.training.anchored_runs import SAVING, all_but_slow, config, logged, sft_trainer, trained

SOURCES = {"random": "random", "self": "self", "rows": sft_rows(6)}


@pytest.mark.parametrize("name", all_but_slow(SOURCES, ["self"]))
def test_a_run_that_was_stopped_ends_with_the_same_bits(name, options):
    """Also where the checkpoint was moved, and nothing of the first run is left beside it."""
    anchor = config(source=SOURCES[name], every=2 if name == "self" else 1, max_length=24)
    whole = trained(options, anchor, **SAVING)
    checkpoint = f"{options['output_dir']}-moved/checkpoint-2"
    shutil.copytree(f"{options['output_dir']}/checkpoint-2", checkpoint)
    again = options | {"output_dir": f"{options['output_dir']}-again"}
    resumed = trained(again, anchor, resume=checkpoint, **SAVING)
    assert_same(adapter(resumed.model), adapter(whole.model))
    for key in ("anchor/kl", "anchor/loss", "loss"):
        assert logged(resumed, key) == logged(whole, key)
    assert max(logged(whole, "anchor/kl")) > 1e-6
    # And once more, from a checkpoint that the resumed run wrote.
    third = trained(again, anchor, resume=f"{again['output_dir']}/checkpoint-4", **SAVING)
    assert_same(adapter(third.model), adapter(whole.model))


def test_text_of_the_reference_is_kept_and_read_again(options):
    """In the folder of the run and in each checkpoint; where that has none it is sampled again, and must be equal."""
    anchor = config(source="self")
    whole = trained(options, anchor, max_steps=3, **SAVING)
    folder = Path(options["output_dir"])
    kept = folder / "checkpoint-2" / "anchor.safetensors"
    for path in (folder / "anchor.safetensors", kept):
        assert AnchorText.load(path, anchor, whole.anchor_reference).digest() == whole.anchor_text.digest()

    def resumed() -> SFTTrainer:
        return trained(options, anchor, resume=str(folder / "checkpoint-2"), max_steps=3, **SAVING)

    kept.unlink()
    assert_same(adapter(resumed().model), adapter(whole.model))
    other = get_peft_model(tiny("gpt2", seed=1), HalfFTConfig())
    text = anchor_text(anchor, other, tokenizer(), Reference.now(other))
    text.save(kept)
    with pytest.raises(IsolateError, match="was sampled from another reference"):
        resumed()
    # As if of this model: only the digest in the checkpoint tells it from the run's.
    AnchorText(anchor, text._rows, whole.anchor_reference.digest()).save(kept)
    with pytest.raises(IsolateError, match=r"its text was another.*leave anchor\.safetensors in the checkpoint"):
        resumed()
    record = Record.of(kept.parent)
    for name, value in {"temperature": 0.5, "n_rows": 3}.items():
        with pytest.raises(IsolateError, match=f"and this one has {name}={value}"):
            check_resumed(kept.parent, record._replace(config=record.config | {name: value}))
    kept.write_bytes(kept.read_bytes()[:-8])
    with pytest.raises(FormatError):
        resumed()


OTHERWISE: dict[str, tuple[dict, dict | None, str]] = {
    "beta": ({}, {"beta": 2.0}, r"beta=1\.0.*beta=2\.0"),
    "source": ({}, {"source": "self"}, r"source='random'.*source='self'"),
    "seed of the reference's text": ({"source": "self"}, {"source": "self", "seed": 1}, r"seed=0.*seed=1"),
    "rows": ({"source": sft_rows(4)}, {"source": sft_rows(5)}, r"'rows': 4.*'rows': 5"),
    "no anchor": ({}, {"beta": 0}, r"beta=1\.0, and this one has no anchor"),
    "an anchor": ({"beta": 0}, {}, "it had no anchor"),
}


@pytest.mark.parametrize("name", all_but_slow(OTHERWISE, ["rows", "an anchor"]))
def test_another_anchor_is_no_resumption(name, options):
    then, now, message = OTHERWISE[name]
    trained(options, config(**then), max_steps=1, save_strategy="steps", save_steps=1)
    for resume in (True, f"{options['output_dir']}/checkpoint-1"):
        with pytest.raises(IsolateError, match=rf"(?s)checkpoint-1' was anchored otherwise: .*{message}.*a new run"):
            trained(options, config(**now), resume=resume)


def test_a_file_is_what_it_was_when_the_trainer_was_made(options, tmp_path):
    """It may be changed or removed while the run goes on: the checkpoint tells of the text that was read."""
    path = tmp_path / "old.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sft_rows(4)), encoding="utf-8")
    trainer = sft_trainer("llama", options, config(source=path), max_steps=1, save_strategy="steps", save_steps=1)
    path.unlink()
    trainer.train()
    checkpoint = Path(options["output_dir"]) / "checkpoint-1"
    record = Record.of(checkpoint)
    assert record.config == config(source=sft_rows(4)).to_dict()
    assert record.text == trainer.anchor_text.digest()
    # What other sources alone depend on may differ.
    check_resumed(checkpoint, record._replace(config=record.config | {"temperature": 0.5, "n_rows": 3}))
    with pytest.raises(IsolateError, match=r"max_length=12, and this one has max_length=13"):
        check_resumed(checkpoint, record._replace(config=record.config | {"max_length": 13}))


def test_a_model_that_another_was_made_from_is_another_anchor(options):
    """A trainer built on the trained adapter would be held to that: the first run's was held to the base."""
    anchor = config()
    first = trained(options, anchor, max_steps=1, save_strategy="steps", save_steps=1)
    again = AnchoredSFTTrainer(
        model=first.model, args=SFTConfig(**options), train_dataset=Dataset.from_list(sft_rows(8)),
        processing_class=tokenizer(), anchor=anchor,
    )  # fmt: skip
    assert again.anchor_reference.n_bytes > 0
    with pytest.raises(IsolateError, match="held to another model: make the trainer as that of the first run"):
        again.train(resume_from_checkpoint=f"{options['output_dir']}/checkpoint-1")


def test_steps_without_the_anchor_are_not_passed_over(options):
    """A plain trainer hands on what a checkpoint said of the anchor, and trains without it."""
    one = {"save_strategy": "steps", "save_steps": 1}
    trained(options, config(), max_steps=1, **one)
    trained(options, None, resume=f"{options['output_dir']}/checkpoint-1", max_steps=2, **one)
    with pytest.raises(IsolateError, match=r"anchored until step 1 and went on without, to step 2: go on from"):
        trained(options, config(), resume=f"{options['output_dir']}/checkpoint-2")


def test_a_record_that_was_altered_is_refused(options):
    trained(options, config(), max_steps=1, save_strategy="steps", save_steps=1)
    path = Path(options["output_dir"]) / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["AnchoredTo"] = {"args": {"konfig": {}}}
    path.write_text(json.dumps(state))
    with pytest.raises(IsolateError, match=r"trainer_state\.json' does not tell .*begin anew"):
        trained(options, config(), resume=str(path.parent))


@pytest.mark.slow
def test_callbacks_that_transformers_restores_tell_the_same(options):
    """It then makes them anew from what the checkpoint tells."""
    run = SAVING | {"restore_callback_states_from_checkpoint": True}
    whole = trained(options, config(source="self"), **run)
    resumed = trained(options, config(source="self"), resume=f"{options['output_dir']}/checkpoint-2", **run)
    assert_same(adapter(resumed.model), adapter(whole.model))
    path = Path(options["output_dir"]) / "checkpoint-4"
    assert json.loads((path / "trainer_state.json").read_text())["stateful_callbacks"]["AnchoredTo"]["args"]["text"]
    assert (path / "anchor.safetensors").exists()
