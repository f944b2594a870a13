"""The app itself: help, what counts as a user's mistake, the process, and what importing costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import peft_isolate
from peft_isolate.cli import app
from peft_isolate.cli.app import Commands
from peft_isolate.errors import FormatError, RegionError

COMMANDS = ("plan", "importance", "search")


def test_help_has_examples(call):
    assert call("--help").stdout == call().stdout
    assert all(f"peft-isolate {name} " in call("--help").stdout for name in COMMANDS)
    for name in COMMANDS:
        result = call(name, "--help")
        assert (result.exit_code, result.stderr) == (0, "")
        assert f"peft-isolate {name} " in result.stdout


def test_version(call):
    assert call("--version").stdout.strip() == peft_isolate.__version__


def test_a_wrong_call_is_one_line(mistake):
    assert "No such command 'plam'" in mistake("plam")
    assert "Missing option '--config'" in mistake("plan", "base")
    assert "Missing argument" in mistake("importance")
    assert "--wrong" in mistake("plan", "base", "--config", "cofitune", "--wrong")
    assert "--method" in mistake("importance", "base", "task.jsonl", "--method", "relative")


def failing(error: BaseException) -> typer.Typer:
    made = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @made.callback()
    def start() -> None:
        """A group of one."""

    @made.command()
    def fail() -> None:
        raise error

    return made


@pytest.mark.parametrize(
    "error",
    [
        RegionError("no such\nlayer"),
        FormatError("no such layer"),
        FileNotFoundError("no such layer"),
        ImportError("no such layer: pip install 'peft_isolate[plots]'"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_1(error):
    result = CliRunner().invoke(failing(error), ["fail"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no such layer")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), KeyError("a bug"), ModuleNotFoundError("No module named 'x'"), AssertionError()]
)
def test_any_other_exception_keeps_its_traceback(error):
    result = CliRunner().invoke(failing(error), ["fail"])
    assert result.exception is error
    assert "error:" not in result.stderr


def shell(folder: Path, *args: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "peft_isolate.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_a_mistake_as_a_shell_sees_it(home):
    wrong = shell(home, "plan", "base", "--config", "nowhere.yaml")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == "error: there is no file and no folder 'nowhere.yaml'\n"


@pytest.mark.slow
def test_a_plan_as_a_shell_sees_it(home):
    right = shell(home, "plan", "base", "--config", "cofitune")
    assert right.returncode == 0, right.stderr
    assert "model.layers.1.mlp.up_proj.weight" in right.stdout


def test_what_importing_costs():
    """The package needs no typer; the command line starts without what only some commands need."""
    code = """
import sys, peft_isolate
print(sorted({"typer", "trl", "datasets", "lm_eval"} & set(sys.modules)))
import peft_isolate.cli
print(sorted({"trl", "datasets", "matplotlib", "lm_eval"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", "[]"]


def test_without_standalone_mode_errors_are_raised():
    with pytest.raises(RegionError):
        typer.main.get_command(failing(RegionError("x"))).main(["fail"], standalone_mode=False)
    assert typer.main.get_command(app).main(["--version"], standalone_mode=False) == 0
