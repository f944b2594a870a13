"""The text of a model card: what an adapter changed, on which base, by which method, and how to load it."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ...regions.plots import magnitude_text, sorted_roles
from .summary import Row, Summary, share_text
from .text import size_text

PICTURE = "delta.png"
SHADES = "░▒▓█"
UNCHANGED, ABSENT = "·", " "
# Of PEFT's task types, the class that loads the base.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def card(summary: Summary, *, measured: Sequence[str] = (), picture: str | None = None) -> str:
    """The body of a model card, in Markdown, without front matter.

    Args:
        summary: Of the adapter.
        measured: What else is known of it and was measured, a sentence or a number each.
        picture: File of the picture beside the card, where there is one.
    """
    parts = [
        f"# {_method(summary)}" + (f" on {_code(summary.base)}" if summary.base else ""),
        _what(summary),
        "## What changed",
        _table(summary),
        text_map(summary),
        f"![Root mean square of the delta, layers × roles]({picture})" if picture else "",
        "## How to load",
        _loading(summary),
        "## Base",
        _base(summary),
        "## Method",
        _config(summary),
        "## Measured",
        "\n".join(f"- {line}" for line in [*_measured(summary), *measured]),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(summary)),
    ]
    return "\n\n".join(part for part in parts if part)


def front_matter(summary: Summary, known: Mapping[str, Any]) -> dict[str, Any]:
    """The card's metadata for the Hub: what is known already stays, the license above all.

    Args:
        summary: Of the adapter.
        known: What an existing card says.
    """
    found = dict(known)
    # PEFT writes paths of the machine that trained, too, and empty names, which the Hub refuses.
    if isinstance(name := found.get("base_model", ""), str) and not is_hub_name(name):
        found.pop("base_model", None)
    if summary.base and is_hub_name(summary.base):
        found["base_model"] = summary.base
    found["library_name"] = "peft"
    tags = known.get("tags")
    kept = [tags] if isinstance(tags, str) else tags if isinstance(tags, list) else []
    kept = [tag for tag in kept if isinstance(tag, str)]
    kept = [tag for tag in kept if not tag.startswith("base_model:adapter:") or is_hub_name(tag[19:])]
    found["tags"] = list(dict.fromkeys([*kept, "peft_isolate", summary.method.lower()]))
    return found


def is_hub_name(name: str) -> bool:
    """Whether a model's name can be one of the Hub, and is no folder here."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII)) and not os.path.exists(name)


def text_map(summary: Summary) -> str:
    """How far each role moved in each layer, one sign a layer, in four shades."""
    magnitudes, largest = summary.magnitudes(), max((row.rms for row in summary.rows), default=0.0)
    layers = sorted({layer for layer, _ in magnitudes if layer is not None})
    selected = {(row.layer, row.role) for row in summary.rows if row.trained + row.held}
    names = sorted_roles(magnitudes)
    width = max((len(_plain(name)) for name in names), default=0)

    def sign(layer: int | None, role: str) -> str:
        if (layer, role) not in magnitudes:
            return ABSENT
        return shade(magnitudes[layer, role], largest) if (layer, role) in selected else UNCHANGED

    outside = any(layer is None for layer, _ in magnitudes)
    lines = [
        f"{_plain(role):{width}}  {''.join(sign(layer, role) for layer in layers)}"
        + (f"  {sign(None, role)}" if outside else "")
        for role in names
    ]
    where = [f"layers {layers[0]} to {layers[-1]}" if layers else "", "outside the layers" if outside else ""]
    steps = [f"{sign} up to {magnitude_text(largest * (i + 1) / 4)}" for i, sign in enumerate(SHADES)]
    legend = f"root mean square of the delta: {', '.join(steps)}; {UNCHANGED} unchanged"
    heading = f"{'':{width}}  {', then '.join(text for text in where if text)}"
    return "\n".join(["```text", *(line.rstrip() for line in [heading, *lines]), legend, "```"])


def shade(magnitude: float, largest: float) -> str:
    """One of four shades, or a question mark for what is no number."""
    if not math.isfinite(magnitude) or not math.isfinite(largest):
        return "?"
    return SHADES[max(0, math.ceil(4 * magnitude / largest) - 1)] if largest else SHADES[0]


def _method(summary: Summary) -> str:
    return summary.title or _plain(summary.method)


def _what(summary: Summary) -> str:
    method = f"[{_method(summary)}]({summary.paper})" if summary.paper else _method(summary)
    share = "" if summary.share is None else f", {summary.share:.2%} of the model"
    beside = f" Beside them it holds {_listed(summary.beside)}." if summary.beside else ""
    return (
        f"An adapter of {method}: numbers that are added to {summary.trained + summary.held:,} scalars{share}. Every "
        f"other scalar is the base's own, bit for bit.{beside}"
    )


def _table(summary: Summary) -> str:
    header = ("role", "selection", "tensors", "trained", "held", "of the role", "rms", "largest")
    rows = [row for row in summary.by_role().values() if row.trained + row.held]
    lines = [header, ("---", "---", *["---:"] * 6), *(_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    kinds = ", ".join(row.kinds).replace("_", " ")
    numbers = (f"{row.parameters:,}", f"{row.trained:,}", f"{row.held:,}", share_text(row))
    return (_plain(row.role), kinds, *numbers, magnitude_text(row.rms), magnitude_text(row.largest))


def _loading(summary: Summary) -> str:
    name = _literal(summary.base or "the base model")
    revision = f", revision={_literal(summary.revision)}" if summary.revision else ""
    loader = AUTO_CLASSES.get(summary.task or "") or summary.base_class
    code = ["import peft_isolate  # registers the method with PEFT: first", "from peft import PeftModel"]
    if loader is None:
        code += ["", "base = ...  # the model that the adapter was trained on, made as it was then"]
    else:
        code += [f"from transformers import {loader}", "", f"base = {loader}.from_pretrained({name}{revision})"]
    code.append('model = PeftModel.from_pretrained(base, ".")  # this folder; or this repository\'s name on the Hub')
    shown = "\n".join(["```python", *code, "```"])
    if loader is None:
        return shown
    flag = f" --revision {shlex.quote(_plain(summary.revision))}" if summary.revision else ""
    merge = f"peft-isolate merge {shlex.quote(_plain(summary.base or 'BASE'))} . --out ../merged{flag}"
    return f"{shown}\n\nAs a model of its own, which runs without PEFT and peft_isolate:\n\n```sh\n{merge}\n```"


def _base(summary: Summary) -> str:
    name = _code(summary.base) if summary.base else "not named in the config"
    if summary.base and is_hub_name(summary.base):
        name = f"[{_code(summary.base)}](https://huggingface.co/{summary.base})"
    revision = f", revision {_code(summary.revision)}" if summary.revision else ", no revision recorded"
    guard = (
        "The adapter carries a fingerprint of it, and refuses another base as far as that can tell."
        if summary.fingerprint
        else "The adapter carries no fingerprint of it: nothing refuses another base of these names and shapes."
    )
    return f"{name}{revision}. {guard}"


def _config(summary: Summary) -> str:
    text = yaml.safe_dump({"method": summary.method.lower(), **summary.fields}, sort_keys=False, allow_unicode=True)
    paper = f"{_method(summary)}: {summary.paper}\n\n" if summary.paper else ""
    return f"{paper}Made by this config:\n\n```yaml\n{text.replace('`', '').replace('<!--', '')}```"


def _measured(summary: Summary) -> list[str]:
    bytes_text = f"{size_text(summary.n_bytes)} of deltas, {summary.stored_as}"
    if summary.base_bytes:
        share = summary.n_bytes / summary.base_bytes
        bytes_text += f": {share:.2%} of the base's {size_text(summary.base_bytes)}"
    lines = [
        bytes_text,
        f"root mean square of the delta {magnitude_text(summary.rms)}, largest magnitude "
        f"{magnitude_text(summary.largest)}",
    ]
    if summary.masked:
        lines.append(f"a soft mask acts on {summary.masked} tensors; it is in these numbers where it damps the update")
    made = f"; the adapter was made with PEFT {_plain(summary.peft_version)}" if summary.peft_version else ""
    return [*lines, f"this card was written by peft_isolate {summary.version}{made}"]


def _limits(summary: Summary) -> list[str]:
    lines = [
        "A process that has not imported `peft_isolate` cannot load it: the package must be there.",
        "It is worth something on its base alone: not on a quantised copy that shall be merged, nor on another "
        "version of the model.",
        "Nothing here says how good the model is: no evaluation is part of this card.",
    ]
    if summary.packed is not None:
        lines.insert(1, "It is packed, for inference only: `peft-isolate decompress` makes one to train on.")
    if summary.beside:
        lines.append(f"{_listed(summary.beside)}: saved whole, or in rows, by PEFT; the first sentence leaves it out.")
    return lines


def _listed(names: Sequence[str]) -> str:
    return ", ".join(_code(name) for name in names)


def _plain(text: str) -> str:
    """A name from a stranger's file as one that Markdown takes for nothing else."""
    return re.sub(r"[`|<>\[\]]", "", " ".join(text.split()))


def _literal(text: str) -> str:
    """Text as Python writes it, without what could end a comment of Markdown's."""
    return json.dumps(text, ensure_ascii=False).replace("<", "\\u003c")


def _code(text: str | None) -> str:
    return f"`{_plain(text or '')}`"
