"""What does an anchor cost in a training step, and does `anchor_cost` say so beforehand?

A step of a Llama shape as a trainer takes it, 4 × 256 tokens of the new task, and in front of it the anchor's
forwards and backward on 2 or 8 rows of 128 random tokens; AdamW. HFT, LoRA of rank 16 and full fine-tuning, with a
vocabulary of 8192; HFT also with one of 32768, of which the head is larger than the layers, and with gradient
checkpointing.

- `anchor_step.csv`: medians of interleaved steps, in milliseconds of one core, which other work on the machine
  disturbs less than the clock on the wall. "more" is the time over that of the plain step, less one; "estimated" is
  what `anchor_cost` says, which leaves the optimizer out.
- `anchor_memory.csv`: three steps in a process of their own. "beyond the weights" is the peak of resident memory less
  what the base takes, "logits" and "reference" what `anchor_cost` says of them.
- `anchor_sampling.csv`: tokens a second that source "self" samples, beside those that plain steps train.
"""

from __future__ import annotations

import copy
import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import peers
import torch
from common import device_name, report
from memory import M_ARENA_MAX, M_MMAP_THRESHOLD, _resident
from step import arguments
from top import MIB, bytes_of_this_process
from torch import nn

from peft_isolate.deltas.reference import Reference
from peft_isolate.evaluation.divergence import divergence
from peft_isolate.training.anchor.config import AnchorConfig
from peft_isolate.training.anchor.cost import anchor_cost
from peft_isolate.training.anchor.text import anchor_text

METHODS = {"HFT": peers.half, "LoRA r = 16": peers.lora, "full fine-tuning": peers.full}
ROWS = (2, 8)
LENGTH = 128
SAMPLED = 32


class Group(NamedTuple):
    """Runs that are timed together: a plain step and anchored ones."""

    method: str
    vocabulary: int
    checkpointing: bool = False


GROUPS = [
    Group("HFT", 8192),
    Group("HFT", 32768),
    Group("HFT", 8192, checkpointing=True),
    Group("LoRA r = 16", 8192),
    Group("full fine-tuning", 8192),
]


class Shape(NamedTuple):
    """Width and layers of the model, batch and length of the new task."""

    width: int
    layers: int
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Of the new task in a step."""
        return self.batch * self.length


def base_of(group: Group, shape: Shape) -> nn.Module:
    """The model that a group trains something of."""
    base = peers.llama(shape.width, shape.layers)
    base.resize_token_embeddings(group.vocabulary, mean_resizing=False)
    return base


def made(group: Group, base: nn.Module) -> nn.Module:
    """The model of a group, ready to be trained."""
    model = METHODS[group.method](base).train()
    if group.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    return model


def config_of(rows: int) -> AnchorConfig:
    """An anchor on so many rows of random tokens."""
    return AnchorConfig(batch_size=rows, max_length=LENGTH)


def step_of(model: nn.Module, inputs: torch.Tensor, rows: int) -> Callable[[], None]:
    """A plain step after an anchor on so many rows; 0: the plain step alone."""
    plain = peers.step_of(model, inputs)
    if not rows:
        return plain
    config = config_of(rows)
    reference = Reference.now(model)
    text = anchor_text(config, model)
    done = 0

    def step() -> None:
        nonlocal done
        found = divergence(model, text.batch(done), reference)
        (config.beta * found.total / text.global_tokens(done)).backward()
        done += 1
        plain()

    return step


def core_seconds(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of one core that each run takes; one of each in turn, after one that is not counted."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(1 + rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if i:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def step_rows(group: Group, shape: Shape, rounds: int) -> Iterator[dict[str, str]]:
    """A row for the plain step and each of the anchored ones."""
    model = made(group, base_of(group, shape))
    inputs = peers.inputs_of(model, shape.batch, shape.length)
    steps = {str(rows): step_of(copy.deepcopy(model), inputs, rows) for rows in (0, *ROWS)}
    seconds = core_seconds(steps, rounds)
    for rows in (0, *ROWS):
        cost = anchor_cost(model, config_of(rows), shape.tokens, checkpointing=group.checkpointing) if rows else None
        yield described(group, shape, rows) | {
            "core ms a step": f"{1e3 * seconds[str(rows)]:.0f}",
            "more": f"{seconds[str(rows)] / seconds['0'] - 1:.2f}" if cost else "",
            "estimated": f"{cost.share:.2f}" if cost else "",
        }


def described(group: Group, shape: Shape, rows: int) -> dict[str, str]:
    """What a row is of."""
    return {
        "device": device_name("cpu"),
        "model": f"{shape.width} × {shape.layers}",
        "vocabulary": str(group.vocabulary),
        "method": group.method,
        "checkpointing": "yes" if group.checkpointing else "no",
        "new tokens": str(shape.tokens),
        "anchor tokens": str(rows * LENGTH),
    }


def memory_rows(group: Group, shape: Shape) -> Iterator[dict[str, str]]:
    """A row for the plain step and one for that with the largest anchor."""
    peaks = {rows: peak(group, shape, rows) for rows in (0, ROWS[-1])}
    for rows, (beyond, logits, kept) in peaks.items():
        yield described(group, shape, rows) | {
            "MiB beyond the weights": f"{beyond / MIB:.0f}",
            "more": f"{(beyond - peaks[0][0]) / MIB:.0f}" if rows else "",
            "logits": f"{logits / MIB:.0f}" if rows else "",
            "reference": f"{kept / MIB:.0f}" if rows else "",
        }


def peak(group: Group, shape: Shape, rows: int) -> tuple[int, int, int]:
    """Of a process that trains for three steps: bytes at the peak beyond the base, of the logits, of the reference.

    The latter two as `anchor_cost` says.
    """
    server = multiprocessing.get_context("forkserver")  # which imports once, and never computes
    server.set_forkserver_preload(["peft_isolate", "transformers.models.llama.modeling_llama"])
    receiver, sender = server.Pipe(duplex=False)
    process = server.Process(target=_measure, args=(sender, group, shape, rows))
    process.start()
    sender.close()  # so that a child that dies ends the wait
    result: tuple[int, int, int] = receiver.recv()
    process.join()
    return result


def _measure(sender: Connection, group: Group, shape: Shape, rows: int) -> None:
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    libc.mallopt(M_ARENA_MAX, 1)
    small = made(group, base_of(group, Shape(128, 1, 1, 16)))
    step_of(small, peers.inputs_of(small, 1, 16), rows)()  # whatever is made once
    del small
    base = base_of(group, shape)
    inputs = peers.inputs_of(base, shape.batch, shape.length)
    before = _resident(libc)
    model = made(group, base)
    cost = anchor_cost(model, config_of(rows or 1), shape.tokens, checkpointing=group.checkpointing)
    step = step_of(model, inputs, rows)
    _resident(libc)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    beyond = bytes_of_this_process("VmHWM") - before
    sender.send((beyond, cost.logits_bytes, cost.reference_bytes))


def sampling_rows(shape: Shape, rounds: int) -> Iterator[dict[str, str]]:
    """A row of plain training, one of sampling."""
    group = GROUPS[0]
    model = made(group, base_of(group, shape))
    config = AnchorConfig(source="self", max_length=LENGTH, n_rows=SAMPLED)
    plain = peers.step_of(model, peers.inputs_of(model, shape.batch, shape.length))
    seconds = core_seconds({"training": plain, "sampling": lambda: anchor_text(config, model)}, rounds)
    tokens = {"training": shape.tokens, "sampling": SAMPLED * LENGTH}
    for what, n in tokens.items():
        columns = ("device", "model", "vocabulary", "method")
        about = {name: value for name, value in described(group, shape, 0).items() if name in columns}
        yield about | {"what": what, "tokens": str(n), "tokens a second": f"{n / seconds[what]:.0f}"}


def main() -> None:
    parser = arguments(__doc__, without=["dtype", "device"])
    parser.set_defaults(hidden=256, layers=4, rounds=5)
    parser.add_argument("--what", nargs="+", default=["step", "memory", "sampling"])
    args = parser.parse_args()
    shape = Shape(args.hidden, args.layers, args.batch, args.length)
    if "step" in args.what:
        report("anchor_step", [row for group in GROUPS for row in step_rows(group, shape, args.rounds)])
    if "memory" in args.what:
        report("anchor_memory", [row for group in GROUPS for row in memory_rows(group, shape)])
    if "sampling" in args.what:
        report("anchor_sampling", list(sampling_rows(shape, args.rounds)))


if __name__ == "__main__":
    main()
