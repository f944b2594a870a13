"""A tiny base with its tokenizer and data, as a user has them: in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from typer.testing import CliRunner, Result

from peft_isolate.cli import app
from tests.models import tiny
from tests.texts import chat_rows, sft_rows, tokenizer


@pytest.fixture(autouse=True, scope="package")
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="package")
def home(tmp_path_factory) -> Path:
    """`base`, `task.jsonl`, `general.jsonl`, `chat.jsonl`."""
    home = tmp_path_factory.mktemp("home")
    tiny(num_hidden_layers=4).save_pretrained(home / "base")
    tokenizer().save_pretrained(home / "base")
    general = [{"text": text} for text in ("the sun and the moon.", "a river.", "stones and leaves and birds")]
    for name, rows in (("task", sft_rows(12)), ("general", general), ("chat", chat_rows(4))):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture
def call(home, monkeypatch) -> Callable[..., Result]:
    """`call("plan", "base", …)` in that folder."""
    monkeypatch.chdir(home)
    return lambda *args: CliRunner().invoke(app, list(map(str, args)))


@pytest.fixture
def mistake(call) -> Callable[..., str]:
    """The one line that a user's mistake gives."""

    def line(*args) -> str:
        result = call(*args)
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit)
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
        return lines[0]

    return line
