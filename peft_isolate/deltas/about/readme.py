"""The README.md beside an adapter: ours is written on every save, what a person wrote stays.

Before an adapter is saved, PEFT puts a blank template there, TRL a card of its own. A template that nobody has filled
in is replaced; of TRL's card the beginning is, whose snippet could not load the adapter. Our own card stands between
two marks: what is written above and below them stays, and where a mark is missing, everything does.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn

from ...regions.files import write_whole
from ..adapters import deltas_of, parameter_deltas
from ..config import DeltaConfig
from ..delta import Delta
from .card import card, front_matter
from .measure import summarise
from .summary import Summary

logger = logging.getLogger(__name__)

README = "README.md"
BEGIN = "<!-- peft_isolate: from here to the end mark this is written anew whenever the adapter is saved -->"
END = "<!-- peft_isolate: end -->"
# Nobody writes a longer one; and what a stranger did is left alone.
LARGEST = 2**20
# What PEFT appends to any card.
VERSIONS = re.compile(r"^### Framework versions\s+(?:- PEFT \S+\s*)+\Z", re.MULTILINE)
# What transformers' push_to_hub puts into the template.
PUSHED = re.compile(
    r"^This is the model card of a 🤗 transformers model that has been pushed on the Hub\..*$", re.MULTILINE
)
# The beginning of TRL's card as it comes from the template.
TRLS = re.compile(
    r"\s*# Model Card for [^\n]*\n\nThis model is a fine-tuned version of [^\n]*\n"
    r"It has been trained using \[TRL\]\(https://github\.com/huggingface/trl\)\.\n\n"
    r"## Quick start\n\n```python\n(?:(?!```)[^\n]*\n)*```\n\n(?=## Training procedure\n)"
)


class Readme(NamedTuple):
    """A README.md as it was found.

    Attributes:
        metadata: Its front matter.
        before, after: What stands around our card and stays.
    """

    metadata: dict[str, Any]
    before: str
    after: str


class Remembered(NamedTuple):
    """What the card of an adapter that is being saved will say.

    Attributes:
        summary: Of the adapter.
        folder: Where the card was written; None until it was.
    """

    summary: Summary
    folder: str | None = None


def read_readme(folder: Path) -> Readme | None:
    """The README.md of a folder as far as it stays; None where all of it does, since a person wrote it."""
    path = folder / README
    if not path.exists():
        return Readme({}, "", "")
    if not path.is_file() or path.stat().st_size > LARGEST:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        found = re.match(r"---\r?\n(.*?)^---\s*$(.*)", text, re.DOTALL | re.MULTILINE)
        metadata = yaml.safe_load(found[1]) if found else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    body = found[2] if found else text
    metadata = metadata or {}
    if not isinstance(metadata, dict):
        return None
    if body.count(BEGIN) == body.count(END) == 1:
        before, _, rest = body.partition(BEGIN)
        _, end, after = rest.partition(END)
        return Readme(metadata, before.strip(), VERSIONS.sub("", after).strip()) if end else None
    if is_blank(body):
        return Readme(metadata, "", "")
    if trls := TRLS.match(body):
        return Readme(metadata, "", body[trls.end() :].strip())
    return None


def is_blank(body: str) -> bool:
    """Whether this is the Hub's template, which PEFT and transformers start with, as nobody has filled it in."""
    words = PUSHED.sub("", VERSIONS.sub("", body)).split()
    return not words or words == _template().split()


def _template() -> str:
    from huggingface_hub import ModelCard, ModelCardData

    return str(ModelCard.from_template(ModelCardData()).text)


def write_readme(folder: str | os.PathLike[str], body: str, metadata: Callable[[dict[str, Any]], Any]) -> bool:
    """Write a card as the README.md of a folder, unless a person wrote one.

    Args:
        folder: Of the adapter.
        body: The card.
        metadata: Makes its front matter of the one that is there.

    Returns:
        Whether it was written.
    """
    path = Path(folder) / README
    there = read_readme(path.parent)
    if there is None:
        logger.info("%s was written by a person, and is left as it is", path)
        return False
    said = yaml.safe_dump(metadata(there.metadata), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{said}---", there.before, "\n\n".join([BEGIN, body, END]), there.after]
    data = ("\n\n".join(part for part in parts if part) + "\n").encode()

    def write(beside: Path) -> None:
        beside.write_bytes(data)

    write_whole(path, write)
    return True


def remember(model: nn.Module, config: DeltaConfig, adapter_name: str, saved: dict[str, torch.Tensor]) -> None:
    """Keep in the config what its card shall say: only here the model and the numbers are at hand.

    Each number is read once; no picture is drawn, since training saves many checkpoints. What fails is logged, and
    stops no save.

    Args:
        model: The model that has the adapter.
        config: The adapter's.
        adapter_name: Its name.
        saved: {name in the model: tensor} of what is saved; gathered, where the model is sharded. A process that was
            given nothing, or shards, writes no file.
    """
    config.remembered = None
    if not saved or any(type(tensor) not in (torch.Tensor, nn.Parameter) for tensor in saved.values()):
        return
    try:
        size = sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
        summary = summarise(config, _saved(model, adapter_name, saved), model, n_bytes=size)
        config.remembered = Remembered(summary)
        keep_on_push(model)
    except Exception as error:
        _warn(adapter_name, error)


def keep_on_push(model: nn.Module) -> None:
    """Let `push_to_hub` of this one model upload its card.

    transformers' `push_to_hub` saves a model into a folder, puts the Hub's README.md or a template over what that
    wrote, and uploads the folder by a method of the model, which is the only place in between. So the model that is
    saved, and no class, gets its own.
    """
    if hasattr(model, "_upload_modified_files"):
        vars(model)["_upload_modified_files"] = types.MethodType(_upload_modified_files, model)


def _upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
    """Named as what it stands for, so that a pickled model finds its class's."""
    for config in self.peft_config.values():
        write_remembered(config, working_dir)
    return type(self)._upload_modified_files(self, working_dir, *args, **kwargs)


def _saved(
    model: nn.Module, adapter_name: str, saved: dict[str, torch.Tensor]
) -> Iterator[tuple[str, Delta, dict[str, torch.Tensor]]]:
    named = zip(parameter_deltas(model, adapter_name), deltas_of(model, adapter_name).items(), strict=True)
    for parameter, (key, delta) in named:
        numbers = {name: saved[full] for name in delta.places if (full := f"{key}.{name}") in saved}
        if len(numbers) < len(delta.places):
            delta.check_here()  # what other processes have cannot be asked for: not all of them are here
        yield parameter, delta, numbers


def write_remembered(config: DeltaConfig, folder: str | os.PathLike[str]) -> None:
    """Write the card of the adapter whose config is being saved into this folder.

    A config that is saved alone, elsewhere, gets none: its numbers may have moved since.
    """
    there, path = getattr(config, "remembered", None), os.path.realpath(folder)
    if there is None or there.folder not in (None, path):
        return
    try:
        # PEFT names the base only now, where the config did not.
        named: dict[str, Any] = {"base": config.base_model_name_or_path, "revision": config.revision}
        summary = dataclasses.replace(there.summary, **named)
        write_readme(folder, card(summary), functools.partial(front_matter, summary))
        config.remembered = there._replace(folder=path)
    except Exception as error:
        _warn(path, error)


def _warn(what: str, error: Exception) -> None:
    logger.warning("the model card of %s was not written: %s: %s", what, type(error).__name__, error)
