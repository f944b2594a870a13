"""Every Python snippet of the documentation runs, file by file, in the order a reader meets them.

Replaced are the names of models and data sets on the Hub, by local ones; and the trainers are told that there is no
GPU, as the README tells a reader who has none.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import peft_isolate
import peft_isolate.evaluation
import peft_isolate.training

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
API = sorted((ROOT / "docs" / "api").glob("*.md"))
# What `make docs` installs beside the environment.
MKDOCS = Path(sys.prefix) / "docs"
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


def script_of_docs(name: str):
    """A module that lies in `docs/`."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


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


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub names them: what is no letter is left out, and every space a hyphen."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_named_files_exist():
    """Relative links lead somewhere, to a heading if they name one; so do the test files that the README names."""
    others = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "benchmarks").rglob("README.md")]
    for page in [*PAGES, *API, *others]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name} links to {target}"
            if anchor and linked.suffix == ".md":
                assert anchor in anchors(linked), f"{page.name} links to {target}#{anchor}"
    for named in re.findall(r"`((?:tests|docs|examples)/[\w./-]*)`", (ROOT / "README.md").read_text()):
        assert (ROOT / named).exists(), f"README names {named}"


def test_the_format_is_what_the_modules_say():
    """`python docs/format.py` has been run since a format was changed."""
    module = script_of_docs("format")
    page = module.PAGE.read_text()
    assert page.count("<!-- from ") == 8
    assert module.filled(page) == page


@pytest.mark.parametrize("module", [peft_isolate, peft_isolate.training, peft_isolate.evaluation])
def test_every_public_name_has_its_place_in_the_api(module):
    """Under its public path, or, where a module has the same name and would be shown instead, where it is defined."""
    shown = [name for page in API for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
    assert len(set(shown)) == len(shown)
    for name in module.__all__:
        thing = getattr(module, name)
        defined = f"{thing.__module__}.{thing.__qualname__}"
        paths = {defined}
        if not thing.__module__.endswith(f".{name}"):
            paths |= {f"{holder}.{name}" for holder in ("peft_isolate", module.__name__)}
        assert paths & set(shown), defined


def test_links_lead_where_they_do_on_github():
    """The site's hook: pages by their place there, other files of the repository as words, mistakes as they are."""
    pages = script_of_docs("pages")
    there = {"index.md", "dial.md", "api/methods.md", "examples.md", "plot.png"}
    files = SimpleNamespace(get_file_from_path=lambda path: path if path in there else None)

    def rewritten(source: str, text: str) -> str:
        page = SimpleNamespace(file=SimpleNamespace(src_uri=source))
        return pages.on_page_markdown(text, page, None, files)

    assert rewritten("index.md", "[a](docs/dial.md#find) [b](LICENSE)") == "[a](dial.md#find) b"
    assert rewritten("index.md", "![p](docs/plot.png) [c](#here)") == "![p](plot.png) [c](#here)"
    assert rewritten("dial.md", "[r](../README.md) [e](../examples/README.md)") == "[r](index.md) [e](examples.md)"
    assert rewritten("examples.md", "[d](../docs/dial.md) [t](accelerate)") == "[d](dial.md) t"
    assert (
        rewritten("api/methods.md", "[d](../dial.md) [h](https://x.org/y)") == "[d](../dial.md) [h](https://x.org/y)"
    )
    assert rewritten("dial.md", "[wrong](nowhere.md)") == "[wrong](nowhere.md)"
    assert rewritten("dial.md", "- a\n  - b\n  c") == "- a\n    - b\n  c"
    code = "```sh\n[a](../README.md)\n  - b\n```"
    assert rewritten("dial.md", code) == code


def build_site(repository: Path, out: Path) -> subprocess.CompletedProcess:
    """What `make docs` does, elsewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"PYTHONPATH": str(MKDOCS), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(not MKDOCS.is_dir(), reason="`make docs` installs MkDocs")
def test_the_site_builds_without_a_warning(tmp_path):
    """All pages are in the menu, all links and anchors lead somewhere, all names of the API are found; or it fails."""
    done = build_site(ROOT, tmp_path / "site")
    assert (done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("INFO")]) == (0, [])
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "a chosen region of a model and nothing else" in home
    methods = (tmp_path / "site" / "api" / "methods" / "index.html").read_text(encoding="utf-8")
    assert 'id="peft_isolate.HalfFTConfig"' in methods
    assert "&gt;&gt;&gt;" in methods  # examples are code
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "docs", copy / "docs")
    shutil.copy(ROOT / "mkdocs.yml", copy)
    for kept in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples", "benchmarks", "peft_isolate"):
        (copy / kept).symlink_to(ROOT / kept)
    with open(copy / "docs" / "dial.md", "a", encoding="utf-8") as page:
        page.write("\n[wrong](nowhere.md)\n")
    failed = build_site(copy, tmp_path / "wrong")
    assert failed.returncode != 0
    assert "nowhere.md" in failed.stderr + failed.stdout
