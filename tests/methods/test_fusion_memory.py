"""What `fuse` takes of memory: so many times the largest tensor, however many layers and tasks there are."""

from __future__ import annotations

import sys

import pytest
import torch

from peft_isolate.checkpoints.shards import MAPPED
from tests.checkpoints.test_memory import MIB, growth
from tests.methods.fusions import core, probe
from tests.models import tiny

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")]

SIZES = {"hidden_size": 1024, "intermediate_size": 2048}
LARGEST = 4 * MIB


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{layers: folder with base, tuned, and the tuned one's core}."""
    made = {}
    for layers in (2, 10):
        folder = made[layers] = tmp_path_factory.mktemp("layers")
        config = SIZES | {"num_hidden_layers": layers}
        tiny(dtype=torch.bfloat16, **config).save_pretrained(folder / "base")
        probe(folder / "tuned", 1, dtype=torch.bfloat16, **config)
        core(folder / "base", folder / "tuned", 1.0).save(folder / "region")
    return made


def test_one_parameter_at_a_time(models, tmp_path):
    """Five times the layers, or four times the tasks, take no more."""
    grown = {}
    for layers, tasks in ((2, 2), (10, 2), (2, 8)):
        folder, out = models[layers], tmp_path / f"{layers}-{tasks}"
        names = [f"task{i}" for i in range(tasks)]
        given = (dict.fromkeys(names, str(folder / each)) for each in ("tuned", "region"))
        arguments = ", ".join(map(repr, (str(folder / "base"), *given, str(out))))
        call = f"from peft_isolate.methods.core_isolation.fusion import fuse\nfuse({arguments})"
        grown[layers, tasks] = growth(call, MALLOC_MMAP_THRESHOLD_=str(4 * MIB))
    print({case: f"{bytes / MIB:.0f} MiB" for case, bytes in grown.items()})
    # Of the base's file so much is mapped at a time; the whole of the smaller model is less.
    assert grown[10, 2] <= grown[2, 2] + MAPPED + 32 * MIB
    assert grown[2, 8] <= grown[2, 2] + 32 * MIB
    assert max(grown.values()) <= 10 * LARGEST + 256 * MIB
