"""`plan`: the numbers it prints are the numbers that come true, and nothing is changed by asking."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification

from peft_isolate import HalfFTConfig, Region, plan
from peft_isolate.errors import IsolateError
from tests.models import ARCHITECTURES, tiny


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:the adapter will take")
def test_the_totals_come_true(architecture):
    """Trained scalars, share, bytes of the base and of the adapter: counted on the wrapped model."""
    base = tiny(architecture, torch.bfloat16)
    config = HalfFTConfig()
    state, asked = copy.deepcopy(base.state_dict()), copy.deepcopy(config)
    table = plan(base, config)
    assert config == asked, "asking resolves nothing"
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    total = sum(parameter.numel() for parameter in base.parameters())
    model = get_peft_model(base, config)
    deltas = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained = sum(delta.numel() for delta in deltas)

    assert isinstance(table.region, Region)
    assert table.trained == table.region.count == sum(row.trained for row in table.rows) == trained
    assert table.total == sum(row.scalars for row in table.rows) == total
    assert table.share == trained / total
    assert table.base_bytes == 2 * total
    assert table.adapter_bytes == {"fp32": 4 * trained, "bf16": 2 * trained, "int8": trained}
    assert table.training_bytes == {
        "weights": 2 * total,
        "deltas": sum(delta.numel() * delta.element_size() for delta in deltas),
        "gradients": 4 * trained,
        "adam": 8 * trained,
    }
    assert plan(model, config).region == table.region, "a wrapped model tells the same"


def test_the_table_is_readable():
    shown = str(plan(tiny("phi3"), HalfFTConfig()))
    lines = shown.splitlines()
    assert lines[0].split() == ["parameter", "role", "layer", "selection", "trained", "share"]
    assert any(line.split()[1:4] == ["gate", "0", "48"] and "rows" in line for line in lines)
    assert "more stay frozen" in shown
    assert "scalars, 47." in shown
    assert max(map(len, lines)) < 120


@pytest.mark.filterwarnings("ignore:the adapter will take")
def test_the_head_that_a_task_brings_is_announced():
    """PEFT trains and saves it beside the adapter, and says so in the config only when the model is wrapped."""
    tiny_config = tiny().config
    tiny_config.num_labels = 3
    model, config = LlamaForSequenceClassification(tiny_config), HalfFTConfig(task_type="SEQ_CLS")
    expected = plan(model, config).outside_bytes
    assert expected == 3 * 32 * 4
    wrapped = get_peft_model(model, config)
    assert plan(wrapped, wrapped.peft_config["default"]).outside_bytes == expected


def test_a_foreign_config_is_refused():
    with pytest.raises(IsolateError, match="not LoraConfig"):
        plan(tiny(), LoraConfig())


def test_plot(tmp_path):
    plan(tiny(), HalfFTConfig()).plot(tmp_path / "trained.png")
    assert (tmp_path / "trained.png").read_bytes()[:4] == b"\x89PNG"
