"""Every block and every command that the documentation prints is run in a test, or is listed here with a reason.

A block in a language that nobody runs, or a command that no rule below knows, fails: whoever writes it adds it to what
is run, or says why it is not. Python blocks are run by test_docs.py, the blocks of examples/README.md by
tests/examples/test_scripts.py.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

from peft_isolate import HalfFTConfig
from peft_isolate.cli import app
from tests.texts import sft_rows

ROOT = Path(__file__).parent.parent
BASE = ROOT / "examples" / "demo" / "base"
SCRIPTS = ROOT / "examples" / "README.md"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    SCRIPTS,
    *sorted((ROOT / "benchmarks").rglob("README.md")),
]

BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
PROGRAMS = {
    "peft-isolate", "python", "python3", "make", "pip", "hf", "accelerate", "vllm", "ollama", "llama-quantize",
    "llama-server", "lm_eval", "text-generation-launcher", "torchrun", "git", "curl", "mkdocs", "pytest", "axolotl",
    "llamafactory-cli", ".ci/run",
}  # fmt: skip

# Commands of this library that need a file of settings, and the test that runs them with one.
WITH_SETTINGS = {
    "isolate": "tests/cli/test_isolate_command.py",
    "search": "tests/cli/test_search_command.py",
}
# Programs that are not run, by the beginning of the command.
NOT_RUN = {
    "pip install": "needs the network",
    "hf upload": "needs the network and an account",
    "vllm serve": "an inference server: needs a GPU",
    "python -m sglang": "an inference server: needs a GPU",
    "text-generation-launcher": "an inference server: needs a GPU",
    "ollama": "an inference server",
    "python convert_hf_to_gguf.py": "a script of llama.cpp",
    "llama-quantize": "a program of llama.cpp",
    "llama-server": "an inference server",
    "accelerate launch": "names the program; the blocks of examples/README.md run it",
    ".ci/run": "it runs this test",
    "pytest -m slow tests/": "a test by name",
}


def commands(page: Path) -> Iterator[str]:
    """The commands that a page prints in its blocks for the shell and in its text, in their order."""
    text = page.read_text(encoding="utf-8")
    found: list[tuple[int, str]] = []
    for block in BLOCK.finditer(text):
        if block[1] in ("sh", "bash") and page != SCRIPTS:
            for line in block[2].replace("\\\n", " ").splitlines():
                found += [(block.start(), " ".join(line.partition(" #")[0].split()))]
    prose = BLOCK.sub(lambda block: " " * len(block[0]), text)
    for span in SPAN.finditer(prose):
        command = " ".join(span[1].split())
        if command.split()[0] in PROGRAMS and " " in command:
            found += [(span.start(), command)]
    yield from (command for _, command in sorted(found, key=lambda each: each[0]) if command)


def known_options(name: str) -> set[str]:
    """The options of a command of this library."""
    return {option for parameter in get_command(app).commands[name].params for option in parameter.opts}


def offence(command: str) -> str | None:
    """What is wrong with a command that is printed, or None."""
    program, *words = shlex.split(command)
    if any(command.startswith(beginning) for beginning in NOT_RUN):
        return None
    if program == "peft-isolate":
        if words[0] not in get_command(app).commands:
            return f"peft-isolate has no command {words[0]!r}"
        unknown = {word for word in words if word.startswith("--")} - known_options(words[0]) - {"--help"}
        return f"peft-isolate {words[0]} has no {sorted(unknown)}" if unknown else None
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return None if words[0] in targets else f"the Makefile has no target {words[0]!r}"
    if program == "python":
        script = ROOT / words[0]
        if words[0] == "benchmarks/<name>.py":
            return None
        if not script.is_file():
            return f"there is no {words[0]}"
        source = script.read_text(encoding="utf-8") + (ROOT / "examples" / "common.py").read_text(encoding="utf-8")
        if script.parent.name == "forgetting":  # options of all stages, and of a real run, are in modules beside it
            beside = [script.parent / "book.py", *script.parent.glob("real_*.py")]
            source += "".join(file.read_text(encoding="utf-8") for file in beside)
        # TRL's own options are in no source here; --config, which names them, is.
        missing = [w for w in words if w.startswith("--") and w not in source and w.removeprefix("--") not in source]
        return f"{words[0]} has no {missing}" if missing else None
    return "no rule knows it: run it in a test, or add it to NOT_RUN with the reason"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_of_a_kind_that_is_run(page):
    """Python and shell are run, JSON is read; another language, or none, is a block that nobody checks."""
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        assert block[1] in ("python", "sh", "bash", "json"), f"{page.name}: ```{block[1]}: {block[2][:60]!r}"
        assert block[1] != "bash" or page == SCRIPTS, f"{page.name}: write ```sh"
        assert block[1] != "python" or page.parent in (ROOT, ROOT / "docs"), f"{page.name} is not in test_docs.py"
        if block[1] == "json":
            assert all(json.loads(line) for line in block[2].splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_known(page):
    """Each is run below, is run by a test that is named, exists as a script or target, or says why it is not run."""
    assert {command: said for command in commands(page) if (said := offence(command))} == {}


def test_what_is_not_run_is_printed_somewhere():
    """No reason outlives its command, and the tests that are named exist."""
    printed = [command for page in PAGES for command in commands(page)]
    assert [b for b in NOT_RUN if not any(command.startswith(b) for command in printed)] == []
    assert all((ROOT / file).is_file() for file in WITH_SETTINGS.values())


@pytest.mark.parametrize(
    "command",
    ["peft-isolate mrege BASE", "peft-isolate merge --uot x", "make tset", "python examples/stf.py", "wget x",
     "python examples/anchored_sft.py --nonsense"],
)  # fmt: skip
def test_a_mistake_is_seen(command):
    """The rules are not empty."""
    assert offence(command)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with what the commands name: ADAPTER, DATA.jsonl; BASE is the demo's model."""
    home = tmp_path_factory.mktemp("commands")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), HalfFTConfig(init_weights=False))
    model.save_pretrained(home / "ADAPTER")
    (home / "DATA.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sft_rows(8)))
    return home


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(command.startswith("peft-isolate ") for command in commands(page))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_commands_of_this_library_run(page, home, monkeypatch):
    """On the demo's base, in the page's order: what one command writes, the next may read."""
    monkeypatch.chdir(home)
    for number, command in enumerate(commands(page)):
        program, *words = shlex.split(command)
        if program != "peft-isolate" or len(words) < 2 or words[0] in WITH_SETTINGS:
            continue
        stand_ins = {"BASE": str(BASE), "ADAPTER…": "ADAPTER", "FOLDER": "ADAPTER"}
        words = [stand_ins.get(word, word) for word in words]
        if "--out" in words:  # each makes a folder of its own; one that has a name is read by the command after it
            at = words.index("--out") + 1
            words[at] = f"{page.stem}-{number}" if words[at] == "ADAPTER" else words[at]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (command, done.output, done.exception)
