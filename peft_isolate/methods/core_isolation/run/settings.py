"""run.json: what a run was told, so that another one does not go on in its folder."""

from __future__ import annotations

import enum
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ....errors import FormatError, IsolateError
from ....regions.files import blocks, write_text

_FORMAT, _VERSION = "peft_isolate.run", 1
# What wrapping a model writes into a config, and what a newer PEFT would change: none of it decides what is trained.
_BOOKKEEPING = ("resolved", "auto_mapping", "peft_version", "plugin", "base_model_name_or_path", "inference_mode")


def plain(name: str, value: Any) -> Any:
    """A value as JSON gives it back.

    Raises:
        IsolateError: JSON cannot hold it.
    """

    def simpler(item: Any) -> Any:
        if isinstance(item, enum.Enum):
            return item.value
        if isinstance(item, os.PathLike):
            return os.fspath(item)
        if isinstance(item, set | frozenset):
            return sorted(item, key=str)
        if hasattr(item, "to_dict"):  # a config of PEFT's, transformers' or accelerate's
            return {key: each for key, each in item.to_dict().items() if key not in _BOOKKEEPING}
        raise IsolateError(
            f"{name} holds {item!r}, a {type(item).__name__}, which run.json cannot hold: a run that is started again "
            "could not tell whether it is the same; use text and numbers"
        )

    return json.loads(json.dumps(value, default=simpler))


def differences(then: Any, now: Any, name: str = "") -> Iterator[str]:
    """Each setting that differs, as "name: … then, … now"."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*then, *now)):
            yield from differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now or type(then) is not type(now):
        yield f"{name}: {_shown(then)} then, {_shown(now)} now"


def check_same(path: Path, settings: Mapping[str, Any]) -> list[str]:
    """Compare with what stands in run.json, where that is.

    Returns:
        What is worth a note: other versions of what computes.

    Raises:
        IsolateError: The run in this folder was another one; every difference is named.
        FormatError: The file is damaged.
    """
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"it is {content['format']!r}, version {content['version']!r}")
        then, made_with = dict(content["settings"]), dict(content["made_with"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(
            f"{path} is no record of a run, or was damaged ({type(error).__name__}: {error}): restore it, or use "
            "another output_dir"
        ) from error
    if different := list(differences(then, dict(settings))):
        raise IsolateError(
            f"{str(path.parent)!r} holds a run with other settings: {'; '.join(different)}. Use the same ones to go "
            "on, or another output_dir"
        )
    return [f"begun with other versions, the numbers may differ: {one}" for one in differences(made_with, versions())]


def save_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write run.json, unless it is there."""
    if not path.is_file():
        content = {"format": _FORMAT, "version": _VERSION, "made_with": versions(), "settings": settings}
        save_json(path, content)


def save_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    save_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def save_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all, unless it stands there already."""
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


def versions() -> dict[str, str]:
    """Of what computes."""
    import peft
    import torch
    import transformers
    import trl

    from .... import _version

    return {
        "peft_isolate": _version.__version__, "peft": peft.__version__, "torch": str(torch.__version__),
        "transformers": transformers.__version__, "trl": trl.__version__,
    }  # fmt: skip


def folder_digest(folder: Path) -> str:
    """Of the names and contents of a folder's tensors and config."""
    hashed = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.is_file() and (path.suffix == ".safetensors" or path.name in ("adapter_config.json", "config.json")):
            hashed.update(path.name.encode() + b"\0")
            for block in blocks(path):
                hashed.update(block)
    return hashed.hexdigest()[:16]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return "nothing" if value is None else repr(value)
