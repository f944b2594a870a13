"""The scripts of the benchmark of forgetting import each other by bare name, and so do their tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "forgetting"))


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> Path:
    """A folder with a tiny base of random weights, under the name of the first one."""
    from pretrain import config, tokenizer
    from protocol import BASES

    folder = tmp_path_factory.mktemp("bases")
    small = config()
    small.hidden_size, small.intermediate_size, small.num_hidden_layers = 16, 32, 2
    torch.manual_seed(0)
    LlamaForCausalLM(small).save_pretrained(folder / BASES[0])
    tokenizer().save_pretrained(folder / BASES[0])
    return folder
