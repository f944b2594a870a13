"""What a training is told: the arguments of TRL's `SFTConfig` and rows that can be trained on, checked beforehand."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import warnings
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

import torch

from ..errors import IsolateError
from ..evaluation.rows import KINDS, Rows, flag, positive, read_rows

# What TRL takes at any value, and every training then stumbles over or passes by.
_COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length")
# What a caller that decides by itself does, and may be told to do.
_AS_WE_DO = {
    "save_strategy": "no", "eval_strategy": "no", "do_eval": False, "push_to_hub": False,
    "load_best_model_at_end": False, "resume_from_checkpoint": None,
}  # fmt: skip
# The fields of each kind of rows, in the order in which TRL looks for them.
FIELDS = (("prompt", "completion"), ("text",), ("messages",))


def sft_config(
    args: Mapping[str, Any], folder: str | os.PathLike[str], own: Mapping[str, str], **defaults: Any
) -> Any:
    """A `trl.SFTConfig` of these arguments.

    Nothing is logged, saved or reported where the arguments do not say so, and without a GPU training is on the CPU,
    in fp32. For the others TRL's defaults hold.

    Args:
        args: Arguments of TRL's `SFTConfig`.
        folder: Its `output_dir`.
        own: {argument that the caller decides by itself: why it cannot be given, unless as it is decided}.
        **defaults: What holds where `args` is silent.

    Raises:
        IsolateError: An argument is unknown, decided already, or has no sense.
        ImportError: TRL is not installed.
    """
    SFTConfig = _class()
    known = {option.name for option in dataclasses.fields(SFTConfig) if option.init}
    hints = get_type_hints(SFTConfig)
    for name, value in args.items():
        if name in own and not (name in _AS_WE_DO and value == _AS_WE_DO[name]):
            raise IsolateError(f"training argument {name!r}: {own[name]}; leave it out")
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=3)
            raise IsolateError(
                f"training argument {name!r} is unknown to trl.SFTConfig"
                + (f"; did you mean one of {close}?" if close else "; its documentation lists what it knows")
            )
        _check_value(name, value, hints[name])
    silent = {} if logs(args) else {"logging_strategy": "no"}
    given = _of_this_machine() | silent | defaults | dict(args) | {"output_dir": str(folder), "save_strategy": "no"}
    try:
        return _made(SFTConfig, given)
    except (ValueError, TypeError) as error:
        raise IsolateError(f"training arguments {dict(args)}: {error}") from error


def logs(args: Mapping[str, Any]) -> bool:
    """Whether the arguments ask for logging."""
    return "logging_steps" in args or "logging_strategy" in args


def given_arguments(given: Any, what: str) -> dict[str, Any]:
    """The arguments as a mapping; of an `SFTConfig` those that are not TRL's defaults, without its `output_dir`.

    Args:
        given: An `SFTConfig`, a mapping of its arguments, or None.
        what: Like "sft", for the message.

    Raises:
        IsolateError: It is something else.
        ImportError: It is none of these, and TRL is not installed.
    """
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    SFTConfig = _class()
    if not isinstance(given, SFTConfig):
        raise IsolateError(f"{what} is a {type(given).__name__}: pass a trl.SFTConfig or a mapping of its arguments")
    # TRL turns bf16 on by itself, on a CPU, too: who says nothing of it did not mean that.
    by_itself = {} if torch.accelerator.is_available() else {"use_cpu": True}
    usual = [_made(SFTConfig, {"output_dir": given.output_dir} | o) for o in (_of_this_machine(), by_itself)]
    names = [option.name for option in dataclasses.fields(SFTConfig) if option.init and option.name != "output_dir"]
    said = {name: getattr(given, name) for name in names}
    return {name: value for name, value in said.items() if all(value != getattr(one, name) for one in usual)}


def trainable_rows(data: Rows, where: str) -> tuple[list[Mapping[str, Any]], tuple[str, ...]]:
    """The rows, and the fields that they are trained by.

    Args:
        data: A JSONL file, or rows.
        where: What they are, for the message.

    Raises:
        IsolateError: There is no row, or one that could not be trained on.
        FormatError: A line of the file is no JSON object.
    """
    rows = read_rows(data)
    fields = next((kind for kind in FIELDS if set(kind) <= set(rows[0])), None)
    if fields is None:
        raise IsolateError(f"{where}: its rows have the fields {sorted(rows[0])}: to train, they need {KINDS}")
    for number, row in enumerate(rows):
        if not set(fields) <= set(row):
            raise IsolateError(
                f"{where}: row {number} has the fields {sorted(row)}, row 0 {sorted(rows[0])}: make them alike"
            )
        for name in sorted(fields):
            if not isinstance(row[name], str | list):
                raise IsolateError(f"{where}, row {number}: {row[name]!r} is neither text nor a list of messages")
    return rows, fields


def _class() -> Any:
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise ImportError(f"training needs TRL ({error}): pip install 'peft_isolate[trl]'") from error
    return SFTConfig


def _of_this_machine() -> dict[str, Any]:
    on_cpu = not torch.accelerator.is_available()
    return {"report_to": "none"} | ({"use_cpu": True, "bf16": False} if on_cpu else {})


def _made(SFTConfig: Any, given: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        # Of TRL's own default: the user has nothing to mend.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)
        return SFTConfig(**given)


def _check_value(name: str, value: Any, hint: Any) -> None:
    """Refuse what is of another kind than a field of numbers or flags: `SFTConfig` itself takes anything."""
    kinds = set(get_args(hint) or [hint])
    if not kinds <= {int, float, bool, type(None)} or (value is None and type(None) in kinds):
        return
    what = f"training argument {name}"
    if bool in kinds:
        return flag(what, value)
    if isinstance(value, str):
        raise IsolateError(f"{what}={value!r} is text: write {_as_number(value)}")
    wanted, called = (Real, "finite") if float in kinds else (Integral, "whole")
    if not isinstance(value, wanted) or isinstance(value, bool) or not math.isfinite(value):
        raise IsolateError(f"{what}={value!r}: use a {called} number")
    if name in _COUNTS:
        positive(what, value, optional=type(None) in kinds)
    if name == "learning_rate" and value < 0:
        raise IsolateError(f"{what}={value!r}: use a number from 0 on")


def _as_number(text: str) -> str:
    """How YAML wants a number: with a point, and a sign after the e."""
    try:
        float(text)
    except ValueError:
        return "a number"
    mantissa, e, exponent = text.strip().lower().partition("e")
    if not e:
        return f"{mantissa}, without quotes"
    return f"{mantissa}{'' if '.' in mantissa else '.0'}e{'' if exponent[0] in '+-' else '+'}{exponent}"
