"""`examples/anchored_sft.py`, as a user starts it, on the demo's model for a few steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.texts import sft_rows

SCRIPT = Path(__file__).parents[2] / "examples" / "anchored_sft.py"
FEW = [
    "--steps=3",
    "--rows=8",
    "--anchor-batch-size=2",
    "--anchor-length=24",
    "--batch-size=2",
    "--learning-rate=1e-2",
]


def start(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), f"--output={folder / 'out'}", *FEW, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
def test_every_anchor_gets_a_line_and_an_adapter(tmp_path):
    done = start(tmp_path, "--every=2", "--beta=5")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "out" / "results.md").read_text()
    assert table in done.stdout
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "the base", "none", "random", "self", "replay",
    ]  # fmt: skip
    adapters = [
        load_file(tmp_path / "out" / name / "adapter_model.safetensors") for name in ("none", "random", "self")
    ]
    name = next(iter(adapters[0]))
    assert not any(adapters[0][name].equal(other[name]) for other in adapters[1:])


@pytest.mark.slow
def test_text_of_the_users_is_replayed_and_a_mistake_is_one_line(tmp_path):
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sft_rows(8)))
    done = start(tmp_path, f"--replay={tmp_path / 'old.jsonl'}", "--steps=1")
    assert done.returncode == 0, done.stderr
    failed = start(tmp_path, f"--replay={tmp_path / 'none.jsonl'}")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: source=")
    assert "Traceback" not in failed.stderr
