"""Tiny models of many architectures, made on the fly from their configs: no file, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import logging

logging.set_verbosity_error()
# Tests run side by side on few cores: more threads than cores make tiny models fifty times slower.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
