"""The demo's data, made offline from the running Python's standard library.

Three things come from here, and `pretrain.py` and `demo.py` share them so that they cannot drift apart:

* *documents*: the library's source files and its help topics, split into training and held-out ones by name;
* *general text*: blocks of held-out documents, on which forgetting is measured;
* *instruction pairs*: a function's signature as the prompt, the first paragraph of its docstring as the completion.

The split is by a hash of the document's name. Neither the base model nor any fine-tuning sees a held-out document, and
the split stays the same on another Python version, whose files differ in content.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Tests repeat the code they test, bundled packages carry their own licences, the tables of `encodings` are no
# language, and `_sysconfigdata*` describes the machine that built Python.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "encodings", "site-packages", "dist-packages", "_bundled"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
TOPICS = "pydoc_data/topics.py"

# One document in HELD_OUT_PERIOD is never trained on.
HELD_OUT_PERIOD = 20

# A form that occurs nowhere in the standard library, so that the base has to learn it.
PROMPT = "### Function\n{signature}\n### Summary\n"
# In characters: shorter ones say nothing, longer ones only cost time.
SUMMARY_LENGTH = (15, 240)
SIGNATURE_LENGTH = 200


@dataclass(frozen=True)
class Document:
    """One text of the standard library.

    Attributes:
        name: the path relative to the library's folder, with forward slashes; a help topic is named
            `pydoc_data/topics/<topic>`.
        text: its content.
    """

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether no training, neither the base's nor a fine-tuning, may see this document."""
        digest = hashlib.sha256(self.name.encode("utf-8")).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_PERIOD == 0


def documents() -> list[Document]:
    """Read the documents of the running Python's standard library, sorted by name.

    Returns:
        At least one training and one held-out document.

    Raises:
        FileNotFoundError: where this Python comes without the source of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = list(_read(root))
    if not any(d.held_out for d in found) or all(d.held_out for d in found):
        raise FileNotFoundError(
            f"no source of Python's standard library under {root}: the demo makes its data from it; "
            "use a Python that ships its .py files (python.org, a distribution's full package, pyenv, uv)"
        )
    return sorted(found, key=lambda document: document.name)


def _read(root: Path) -> Iterator[Document]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few old files are in latin-1: the corpus does without them
        name = relative.as_posix()
        if name == TOPICS:
            yield from _topics(text)
        elif text.strip():
            yield Document(name, text)


def _topics(source: str) -> Iterator[Document]:
    """Yield the language reference that `help()` shows: prose, one document a topic."""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            for topic, text in ast.literal_eval(node.value).items():
                yield Document(f"{TOPICS.removesuffix('.py')}/{topic}", text)


def token_blocks(tokenizer: Any, texts: Sequence[Document], length: int) -> torch.Tensor:
    """Encode documents, each between the tokenizer's bos and eos, and cut their concatenation into equal blocks.

    Args:
        tokenizer: a transformers tokenizer; one without bos or eos simply marks no border there.
        texts: what to encode, in this order.
        length: tokens in a block.

    Returns:
        Token ids, (blocks, length) int64; the incomplete block at the end is dropped.

    Raises:
        ValueError: where the documents do not fill one block.
    """
    ids: list[int] = []
    for document in texts:
        body = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids += bos + body + eos
    blocks = len(ids) // length
    if blocks == 0:
        raise ValueError(
            f"{len(texts)} documents give {len(ids)} tokens, fewer than one block of {length}: shorten it"
        )
    return torch.tensor(ids[: blocks * length], dtype=torch.int64).view(blocks, length)


def general_batches(
    tokenizer: Any, texts: Sequence[Document], *, length: int = 256, batch_size: int = 16, blocks: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """Make the general text on which forgetting is measured.

    Args:
        tokenizer: a transformers tokenizer.
        texts: the documents; only the held-out ones are used.
        length: tokens in a block.
        batch_size: blocks in a batch.
        blocks: how many blocks to keep, evenly spaced over all documents; None keeps all.

    Returns:
        Batches of `input_ids` and `attention_mask`, (batch, length) int64.
    """
    ids = token_blocks(tokenizer, [d for d in texts if d.held_out], length)
    if blocks is not None and blocks < len(ids):
        ids = ids[torch.linspace(0, len(ids) - 1, blocks).round().long()]
    return [{"input_ids": chunk, "attention_mask": torch.ones_like(chunk)} for chunk in ids.split(batch_size)]


def instruction_pairs(
    texts: Sequence[Document], *, seed: int = 0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Build the new task: to summarise a function from its signature.

    Args:
        texts: the documents; those that are no Python source are passed over.
        seed: of the order of the pairs.

    Returns:
        The training pairs, from functions of training documents, and the validation pairs, from held-out ones: both
        shuffled lists of `{"prompt": str, "completion": str}`. No completion occurs twice.
    """
    training: dict[str, str] = {}
    validation: dict[str, str] = {}
    for document in texts:
        target = validation if document.held_out else training
        for function in _functions(document):
            target.setdefault(function.summary, f"{function.name}({function.arguments})")
    validation = {summary: signature for summary, signature in validation.items() if summary not in training}
    return _shuffled(training, seed), _shuffled(validation, seed)


def _shuffled(signatures: dict[str, str], seed: int) -> list[dict[str, str]]:
    pairs = [{"prompt": PROMPT.format(signature=s), "completion": summary} for summary, s in signatures.items()]
    random.Random(seed).shuffle(pairs)
    return pairs


@dataclass(frozen=True)
class Function:
    """A documented public function or method.

    Attributes:
        name: with its module and class, like `textwrap.TextWrapper.fill`.
        arguments: as they stand in its definition.
        summary: the first paragraph of its docstring, on one line.
    """

    name: str
    arguments: str
    summary: str


def three_tasks(texts: Sequence[Document], *, seed: int = 0) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Build three tasks on the same functions, to learn one after the other: each asks for what another tells.

    Args:
        texts: the documents.
        seed: of the order of the rows.

    Returns:
        `{"summary", "arguments", "name"}`, each with "train", from functions of training documents, and "test", from
        held-out ones: shuffled lists of `{"prompt": str, "completion": str}`.
    """
    found: dict[str, dict[str, Function]] = {"train": {}, "test": {}}
    for document in texts:
        for function in _functions(document):
            found["test" if document.held_out else "train"].setdefault(function.summary, function)
    tasks: dict[str, dict[str, list[dict[str, str]]]] = {}
    for part, functions in found.items():
        # A summary that both parts have is trained on, never tested.
        rows = [f for f in functions.values() if part == "train" or f.summary not in found["train"]]
        random.Random(seed).shuffle(rows)
        for task in ("summary", "arguments", "name"):
            tasks.setdefault(task, {})[part] = [_asked(task, function) for function in rows]
    return tasks


def _asked(task: str, function: Function) -> dict[str, str]:
    if task == "summary":
        return {
            "prompt": PROMPT.format(signature=f"{function.name}({function.arguments})"),
            "completion": function.summary,
        }
    name = function.name.rpartition(".")[2]
    if task == "arguments":
        return {
            "prompt": f"### Purpose\n{name}: {function.summary}\n### Arguments\n",
            "completion": f"({function.arguments})",
        }
    return {"prompt": f"### Purpose\n{function.summary}\n### Name\n", "completion": name}


def _functions(document: Document) -> Iterator[Function]:
    """Yield the documented public functions and methods of one source file."""
    if not document.name.endswith(".py"):
        return
    try:
        tree = ast.parse(document.text)
    except SyntaxError:
        return  # templates and files for another version of Python
    module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        prefix, parent = stack.pop()
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            name = f"{prefix}.{node.name}"
            stack.append((name, node))
            if isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            arguments = ast.unparse(node.args)
            summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            shortest, longest = SUMMARY_LENGTH
            if shortest <= len(summary) <= longest and len(f"{name}({arguments})") <= SIGNATURE_LENGTH:
                yield Function(name, arguments, summary)


def preference_pairs(pairs: Sequence[dict[str, Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Turn instruction pairs into preferences: the function's own summary against another function's.

    Args:
        pairs: at least two instruction pairs.
        seed: of the choice of the other function.

    Returns:
        `{"prompt", "chosen", "rejected"}` for each pair, in the same order; a pair whose completion equals the other
        function's is left out.

    Raises:
        ValueError: with fewer than two pairs.
    """
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} instruction pairs leave no other completion to reject: give at least two")
    # A cyclic shift of a shuffled order: every completion is rejected once, none stands against itself.
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    other = dict(zip(order, order[1:] + order[:1], strict=True))
    return [
        {"prompt": p["prompt"], "chosen": p["completion"], "rejected": pairs[other[i]]["completion"]}
        for i, p in enumerate(pairs)
        if p["completion"] != pairs[other[i]]["completion"]
    ]


def load_pairs(source: str, *, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Load instruction pairs from anywhere else.

    Args:
        source: a file (.json, .jsonl, .csv, .parquet), or a folder or Hub id that `datasets.load_dataset` understands,
            with the columns `prompt` and `completion`, or with `messages` whose last one is the assistant's.
        seed: of the validation split where the data brings none.

    Returns:
        Training and validation pairs; in conversations both values are lists of messages.

    Raises:
        ValueError: where it cannot be loaded, lacks the columns or is too short.
    """
    import datasets

    path = Path(source)
    kinds = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    remedy = "give a .json, .jsonl, .csv or .parquet file, a folder that datasets can load, or a Hub id"
    if path.is_file() and path.suffix not in kinds:
        raise ValueError(f"the data set {source!r} ends in {path.suffix!r}: {remedy}")
    try:
        if path.is_file():
            splits = datasets.load_dataset(kinds[path.suffix], data_files=str(path))
        else:
            splits = datasets.load_dataset(source)
    except Exception as error:  # the loaders raise many kinds, none of them documented
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"cannot load the data set {source!r} ({message}): {remedy}") from error
    training = splits["train"] if "train" in splits else next(iter(splits.values()))
    validation = next((splits[name] for name in ("validation", "test") if name in splits), None)
    if validation is None:
        if len(training) < 4:
            raise ValueError(f"the data set {source!r} has {len(training)} rows: it takes at least 4 to split")
        parts = training.train_test_split(test_size=max(2, min(len(training) // 10, 200)), seed=seed)
        training, validation = parts["train"], parts["test"]
    return _pairs(training, source), _pairs(validation, source)


def _pairs(rows: Any, source: str) -> list[dict[str, Any]]:
    columns = set(rows.column_names)
    if {"prompt", "completion"} <= columns:
        pairs = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    elif "messages" in columns:
        pairs = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    else:
        raise ValueError(
            f"the data set {source!r} has the columns {sorted(columns)}: it needs 'prompt' and 'completion', or "
            "'messages'; rename them"
        )
    pairs = [pair for pair in pairs if pair["prompt"] and pair["completion"]]
    if len(pairs) < 2:
        raise ValueError(f"the data set {source!r} has {len(pairs)} rows with a prompt and a completion: give more")
    return pairs
