"""What an adapter has beside its parameters, positions and soft masks, under TRL's trainers: none may be lost."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import use_adapter

from peft_isolate import CoFiTuneConfig
from peft_isolate.deltas.adapters import regions_of
from tests.compare import adapter, assert_same, base, logits
from tests.given import GivenConfig
from tests.importances import importance
from tests.learn import dense, filled
from tests.models import tiny
from tests.texts import sft_rows, tokenizer
from tests.training.test_dpo import dpo, first_loss

CONFIGS = {
    **{kind: functools.partial(GivenConfig, kind=kind) for kind in ("elements", "all_but")},
    **{
        f"masked {damps}": lambda damps=damps: CoFiTuneConfig(
            layer_range=(0, 1), modules="MHA+FFN", importance=importance(), soft_mask=damps
        )
        for damps in ("update", "gradient")
    },
}
pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take")


def sft(model: torch.nn.Module, options: dict, config=None, resume: str | None = None, **changes) -> SFTTrainer:
    """A trainer after its run."""
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**(options | {"weight_decay": 0.5, "learning_rate": 1e-2} | changes)),
        train_dataset=Dataset.from_list(sft_rows()),
        processing_class=tokenizer(),
        peft_config=config,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_run_that_was_stopped_ends_with_the_same_bits(config, options):
    """The checkpoint is loaded into an adapter that has decoded its positions already."""
    run = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    first = options["output_dir"]
    whole = sft(tiny(), options, config(), **run)
    again = filled(get_peft_model(tiny(), config()))
    logits(again)
    resumed = sft(again, options | {"output_dir": f"{first}-again"}, resume=f"{first}/checkpoint-3", **run)
    assert_same(dense(resumed.model), dense(whole.model))
    assert_same(base(resumed.model), dict(tiny().named_parameters()))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_reference_of_a_trained_adapter_is_the_policy(config, options, tmp_path):
    """TRL copies parameters only: with codes of zeros, or of another draw, "ref" would be another model."""
    model = sft(tiny(), options, config()).model
    model.save_pretrained(tmp_path / "sft")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "sft", is_trainable=True)
    policy = logits(model)
    start = adapter(loaded)
    trainer = dpo(loaded, options)
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    assert trainer.state.log_history[8]["loss"] < 0.68
    assert_same(adapter(trainer.model, "ref"), start)
    with use_adapter(trainer.model, "ref"):
        assert torch.equal(logits(trainer.model), policy)
    assert regions_of(trainer.model, "ref") == regions_of(trainer.model, "default")
    assert_same(base(trainer.model), dict(tiny().named_parameters()))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_new_adapter_is_compared_with_its_base(config, options):
    trainer = dpo(tiny(), options, config())
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    with use_adapter(trainer.model, None):
        assert torch.equal(logits(trainer.model), logits(tiny()))
