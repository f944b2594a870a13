"""The rules of the house: who may import whom, how long a file may be, what importing the package costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import peft_isolate

PACKAGE = Path(peft_isolate.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# From top to bottom: a folder imports only itself and what stands before it.
ORDER = ["errors", "regions", "deltas", "checkpoints", "evaluation", "training", "methods", "cli"]
EXEMPT = {"__init__.py", "_register.py", "_version.py"}
PRIVATE_NAMES_ALLOWED = {"_register.py", "deltas/layer.py", "deltas/tuner.py", "deltas/targets.py"}
LONGEST_FILE = 500


def imports(source: str, file: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file of the package imports, at the top, in functions, for typing alike.

    `from a.b import c` gives "a.b.c", relative imports are written out.
    """
    here = ["peft_isolate", *Path(file).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = here[: len(here) - node.level + 1] if node.level else []
            parts = parts + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, ".".join([*parts, alias.name])) for alias in node.names)


def offences(source: str, file: str) -> list[str]:
    """The imports of one file that break the rules of design §3 and §5, and why."""
    found = []
    folder = Path(file).with_suffix("").parts[0]
    if file not in EXEMPT and folder not in ORDER:
        return [f"{file}: {folder!r} has no place in {ORDER}"]
    for line, name in imports(source, file):
        where, parts = f"{file}:{line}: {name}", name.split(".")
        if (
            parts[0] in ("peft", "trl")
            and any(part.startswith("_") for part in parts)
            and file not in PRIVATE_NAMES_ALLOWED
        ):
            found.append(f"{where} is a private name of {parts[0]}")
        if parts[0] != "peft_isolate" or file in EXEMPT or parts[1:2] == ["_version"]:
            continue
        target = parts[1] if len(parts) > 1 else ""
        if target not in ORDER:
            found.append(f"{where} is the package itself, which imports {folder!r}")
        elif ORDER.index(target) > ORDER.index(folder):
            found.append(f"{where} stands below {folder!r}")
        elif folder == target == "methods" and room_of(file) and room_named(parts) not in (None, room_of(file)):
            found.append(f"{where}: a room of methods/ must not know another")
    return found


def room_of(file: str) -> str | None:
    """The method whose folder under methods/ a file is in; None for what stands beside the rooms."""
    parts = Path(file).parts
    return parts[1] if len(parts) > 2 else None


def room_named(parts: list[str]) -> str | None:
    """The room an import reaches into."""
    return parts[2] if len(parts) > 2 and (PACKAGE / "methods" / parts[2]).is_dir() else None


@pytest.mark.parametrize("file", FILES)
def test_a_folder_imports_only_what_stands_above_it(file):
    """Design §3: the order of the folders; no method knows another; private names of PEFT and TRL in four files."""
    assert offences((PACKAGE / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("regions/region.py", "from ..deltas import DeltaConfig"),
        ("regions/region.py", "from ..deltas.config import DeltaConfig"),
        ("regions/region.py", "from .. import deltas"),
        ("regions/region.py", "import peft_isolate.deltas.config"),
        ("regions/region.py", "from peft_isolate.methods import half_ft"),
        ("regions/region.py", "def f():\n    from peft_isolate import deltas"),
        ("regions/region.py", "if TYPE_CHECKING:\n    from ..cli import main"),
        ("regions/region.py", "from peft_isolate import Region"),
        ("regions/region.py", "import peft_isolate"),
        ("regions/region.py", "from .._register import register"),
        ("errors.py", "from .regions import Region"),
        ("training/anchor.py", "from ..methods.plan import plan"),
        ("methods/new/config.py", "from ..half_ft import HalfFTConfig"),
        ("methods/new/config.py", "from peft_isolate.methods.half_ft.draw import draw"),
        ("methods/new/config.py", "from .. import half_ft"),
        ("evaluation/plots.py", "from peft.tuners.tuners_utils import _ExcludedModule"),
        ("evaluation/plots.py", "import trl._compat"),
        ("utils/misc.py", ""),
        ("helpers.py", ""),
    ],
)
def test_the_checker_sees_an_offence(file, source):
    """The rule is not empty: each of these made-up sources is caught."""
    assert len(offences(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cli/main.py", "from ..methods.half_ft import HalfFTConfig"),
        ("methods/new/config.py", "from ...deltas import DeltaConfig\nfrom .draw import draw\nfrom . import draw"),
        ("methods/new/config.py", "from ..plan import plan"),
        ("methods/plan.py", "from .half_ft import HalfFTConfig"),
        ("deltas/layer.py", "from peft.tuners.tuners_utils import _ExcludedModule\nfrom . import compose"),
        ("checkpoints/card.py", "from .._version import __version__"),
        ("regions/region.py", "from ..errors import RegionError\nimport peft_isolate.errors\nimport torch._dynamo"),
        ("__init__.py", "from .methods import half_ft"),
    ],
)
def test_the_checker_lets_the_rest_pass(file, source):
    """What the rule allows is no offence."""
    assert offences(source, file) == []


@pytest.mark.parametrize("file", FILES)
def test_a_file_fits_into_the_head(file):
    """No file grows beyond 500 lines; at some 400 ask which two things it does."""
    assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_importing_the_package_imports_no_optional_one():
    """In a fresh process `import peft_isolate` needs and loads neither TRL nor datasets nor matplotlib."""
    code = "import sys, peft_isolate; print(sorted({'trl', 'datasets', 'matplotlib'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


PUBLIC = [
    "peft_isolate",
    *(f"peft_isolate.{m.name}" for m in pkgutil.iter_modules([str(PACKAGE)]) if m.ispkg and m.name in ORDER),
    *(f"peft_isolate.methods.{m.name}" for m in pkgutil.iter_modules([str(PACKAGE / "methods")]) if m.ispkg),
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist_and_are_explained(name):
    """Every name of `__all__` exists, once, and every function and class says in a docstring of its own what it is."""
    module = importlib.import_module(name)
    assert module.__doc__
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    for public in names:
        thing = getattr(module, public)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            # A dataclass without a docstring gets its signature for one.
            assert thing.__doc__, public
            assert not thing.__doc__.startswith(f"{public}("), public
    assert names or name == "peft_isolate.methods"
