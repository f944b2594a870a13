"""What `core_region` takes of memory: so many times the largest tensor and what is selected, whatever the layers."""

from __future__ import annotations

import sys

import pytest
import torch
from peft import get_peft_model

from peft_isolate.checkpoints.shards import MAPPED
from peft_isolate.methods.core_isolation import CoreIsolationConfig
from tests.checkpoints.folders import load, saved
from tests.checkpoints.test_memory import MIB, growth
from tests.checkpoints.tunings import everything, lora, tuned
from tests.learn import filled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc"),
    pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:nothing is frozen"),
]

LARGEST = 4 * MIB


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{layers: folder with a base and what was tuned from it}."""
    made = {}
    for layers in (2, 10):
        folder = made[layers] = tmp_path_factory.mktemp("layers")
        sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": layers}
        base = saved(folder / "base", dtype=torch.bfloat16, **sizes)
        tuned(folder / "whole", everything, dtype=torch.bfloat16, **sizes)
        get_peft_model(load(base), lora(target_modules="all-linear")).save_pretrained(folder / "lora")
        filled(get_peft_model(load(base), CoreIsolationConfig())).save_pretrained(folder / "ours")
    return made


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("tuned_by", ["whole", "lora", "ours"])
def test_one_tensor_at_a_time(tuned_by, scope, models):
    """Five times the layers take no more than their part of the core."""
    grown = {}
    for layers, folder in models.items():
        arguments = f"{str(folder / 'base')!r}, {str(folder / tuned_by)!r}, 0.1, {scope!r}"
        call = f"from peft_isolate.methods.core_isolation.probe import core_region\ncore_region({arguments})"
        grown[layers] = growth(call, MALLOC_MMAP_THRESHOLD_=str(4 * MIB))
    print(tuned_by, scope, {case: f"{bytes / MIB:.0f} MiB" for case, bytes in grown.items()})
    # Of each file up to 64 MiB stay mapped; those of two layers are smaller.
    assert grown[10] <= grown[2] + 2 * MAPPED + 32 * MIB
    # A LoRA is merged in float64, over a copy of the base's weight; the chunks and tables of `top` are 100 MiB.
    assert max(grown.values()) <= 16 * LARGEST + 2 * MAPPED + 256 * MIB
