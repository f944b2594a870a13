"""Every Python snippet of the documentation runs, file by file, in the order a reader meets them.

Replaced are the names of models and data sets on the Hub, by local ones; and the trainers are told that there is no
GPU, as the README tells a reader who has none.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def rows(**columns: str) -> str:
    return "".join(json.dumps({key: value.format(i) for key, value in columns.items()}) + "\n" for i in range(8))


@pytest.fixture
def stand_ins(tmp_path):
    """{name on the Hub: local folder}."""
    data = {
        "trl-lib/tldr": rows(prompt="def f{}(x):", completion=" Return the number {}."),
        "trl-lib/ultrafeedback_binarized": rows(prompt="def f{}(x):", chosen=" Return {}.", rejected=" Raise {}."),
    }
    for name, text in data.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "train.jsonl").write_text(text)
    local = {name: str(tmp_path / name) for name in data}
    return local | {"Qwen/Qwen3-0.6B": str(ROOT / "examples" / "demo" / "base")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore")
def test_snippets_run(page, stand_ins, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    namespace: dict = {"__name__": "__main__"}
    for number, match in enumerate(SNIPPET.finditer(page.read_text()), start=1):
        code = match.group(1)
        for name, local in stand_ins.items():
            code = code.replace(name, local)
        code = re.sub(r"((?:SFT|DPO)Config\()", r"\1use_cpu=True, output_dir=", code)
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), namespace)


def test_links_and_named_files_exist():
    """Relative links lead somewhere, and so do the test files that the README names as proof."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for named in re.findall(r"`((?:tests|docs|examples)/[\w./-]*)`", (ROOT / "README.md").read_text()):
        assert (ROOT / named).exists(), f"README names {named}"


def test_the_format_is_what_the_modules_say():
    """`python docs/format.py` has been run since a format was changed."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        module = importlib.import_module("format")
    finally:
        sys.path.pop(0)
    page = module.PAGE.read_text()
    assert page.count("<!-- from ") == 8
    assert module.filled(page) == page
