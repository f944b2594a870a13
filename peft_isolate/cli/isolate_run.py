"""What `peft-isolate isolate` reads from its file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import IsolateError
from ..methods.core_isolation.run import IsolationRun
from .read import check_keys, make_config, read_yaml

REQUIRED = ("base", "tasks", "output")
# What the command calls otherwise, or decides itself.
_NOT_THERE = ("output_dir", "progress")
_OF_A_DATASET = ("dataset", "name", "split", "revision", "fields")


def read_run(path: Path) -> IsolationRun:
    """The run as its file says.

    Raises:
        IsolateError: A field is unknown, missing or of another kind; a data set cannot be had.
    """
    said = read_yaml(path)
    options = {field.name for field in dataclasses.fields(IsolationRun)} - {*_NOT_THERE}
    check_keys(said, {*options, *REQUIRED}, str(path))
    if missing := [key for key in REQUIRED if not said.get(key)]:
        raise IsolateError(f"{path}: {missing} must be there; `peft-isolate isolate --help` shows a whole file")
    for key in ("base", "output"):
        if not isinstance(said[key], str):
            raise IsolateError(f"{path}: {key}={said[key]!r} must be text")
    for key in ("sft", "probe_sft", "probes"):
        if not isinstance(said.get(key) or {}, dict):
            raise IsolateError(f"{path}: {key}={said[key]!r} is no mapping")
    if not isinstance(said["tasks"], dict):
        raise IsolateError(f"{path}: tasks={said['tasks']!r} is no mapping: write each task as 'name: file'")
    given = {key: value for key, value in said.items() if key not in (*REQUIRED, "probe_config")}
    given["probe_config"] = _probe_config(said.get("probe_config"), str(path))
    tasks = {name: _task(data, f"{path}, task {name!r}") for name, data in said["tasks"].items()}
    return IsolationRun(said["base"], tasks, said["output"], **given)


def _probe_config(said: Any, where: str) -> Any:
    """A config of PEFT by the name of its method, and its fields."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if said is None:
        return None
    known = {str(kind.value).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(said, dict) or str(said.get("method")).lower() not in known:
        raise IsolateError(f"{where}: probe_config={said!r}: write 'method:' and one of {sorted(known)}")
    fields = {key: value for key, value in said.items() if key != "method"}
    return make_config(known[str(said["method"]).lower()], fields, f"{where}, probe_config")


def _task(said: Any, where: str) -> Any:
    """Rows, or {"train": rows, "test": rows}."""
    if isinstance(said, Mapping) and "dataset" not in said:
        check_keys(said, ("train", "test"), where)
        return {part: _rows(data, f"{where}, {part}") for part, data in said.items()}
    return _rows(said, where)


def _rows(said: Any, where: str) -> Any:
    """A file's name as it is, or the rows of a data set."""
    if isinstance(said, str):
        return said
    if not isinstance(said, Mapping):
        raise IsolateError(f"{where}: {said!r}: write a JSONL file, or {{dataset: …, split: …}}")
    check_keys(said, _OF_A_DATASET, where)
    fields = said.get("fields")
    if fields is not None and not isinstance(fields, Mapping):
        raise IsolateError(f"{where}: fields={fields!r}: write each as 'prompt: the column's name'")
    rows = _loaded(said, where)
    if fields is None:
        return rows
    if missing := sorted({str(column) for column in fields.values()} - set(rows.column_names)):
        raise IsolateError(f"{where}: there is no column {missing}: the data set has {rows.column_names}")
    return [{str(field): row[column] for field, column in fields.items()} for row in rows]


def _loaded(said: Mapping[str, Any], where: str) -> Any:
    """One split of a data set, of the Hub or of a folder."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data sets need datasets ({error}): pip install 'peft_isolate[trl]'") from error
    split = said.get("split", "train")
    try:
        return datasets.load_dataset(said["dataset"], said.get("name"), split=split, revision=said.get("revision"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise IsolateError(f"{where}: the split {split!r} of {said['dataset']!r} cannot be had: {reason}") from error
