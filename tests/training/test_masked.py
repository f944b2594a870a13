"""CoFiTune's soft mask under TRL's trainers: no trainer may lose it, and none may train past it."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from trl.trainer.utils import use_adapter

from peft_isolate import CoFiTuneConfig
from tests.compare import adapter, assert_same, base, logits
from tests.importances import importance
from tests.learn import dense, filled
from tests.models import tiny
from tests.training.test_dpo import dpo, first_loss
from tests.training.test_elements import sft

MASKS = ("update", "gradient")
pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take")


def masked(soft_mask: str) -> CoFiTuneConfig:
    return CoFiTuneConfig(layer_range=(0, 1), modules="MHA+FFN", importance=importance(), soft_mask=soft_mask)


@pytest.mark.parametrize("soft_mask", MASKS)
def test_a_run_that_was_stopped_ends_with_the_same_bits(soft_mask, options):
    run = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    first = options["output_dir"]
    whole = sft(tiny(), options, masked(soft_mask), **run)
    again = filled(get_peft_model(tiny(), masked(soft_mask)))
    resumed = sft(again, options | {"output_dir": f"{first}-again"}, resume=f"{first}/checkpoint-3", **run)
    assert_same(dense(resumed.model), dense(whole.model))
    assert_same(base(resumed.model), dict(tiny().named_parameters()))


@pytest.mark.parametrize("soft_mask", MASKS)
def test_the_reference_of_a_trained_adapter_is_the_policy(soft_mask, options, tmp_path):
    """TRL copies parameters only: without its mask "ref" would be another model than the policy."""
    model = sft(tiny(), options, masked(soft_mask)).model
    model.save_pretrained(tmp_path / "sft")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "sft", is_trainable=True)
    policy, start = logits(model), adapter(loaded)
    trainer = dpo(loaded, options)
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    assert trainer.state.log_history[8]["loss"] < 0.68
    assert_same(adapter(trainer.model, "ref"), start)
    with use_adapter(trainer.model, "ref"):
        assert torch.equal(logits(trainer.model), policy)
    assert_same(base(trainer.model), dict(tiny().named_parameters()))


def test_a_new_adapter_is_compared_with_its_base(options):
    trainer = dpo(tiny(), options, masked("update"))
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    with use_adapter(trainer.model, None):
        assert torch.equal(logits(trainer.model), logits(tiny()))
