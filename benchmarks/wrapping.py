"""How long does it take to wrap a model and to plan, and in how much memory?

`get_peft_model` and `plan` on the shapes of Llamas of 1 B, 7 B and 70 B on the meta device, where no weight is: what
is left is the library's own work. LoRA of rank 16 beside them, which draws its matrices on the CPU unless it is told
not to (`low_cpu_mem_usage`: the second line). Each in a process of its own, which has wrapped a small model first;
seconds are the median of several models, memory the peak of what is resident (VmHWM) in the first of them beyond what
was before.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from common import Bar, report
from peers import LINEARS
from peft import LoraConfig, PeftConfig, get_peft_model
from top import MIB, bytes_of_this_process
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_isolate import CoFiTuneConfig, HalfFTConfig, plan

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "HFT": HalfFTConfig,
    "CoFiTune": lambda: CoFiTuneConfig(soft_mask=None),
    "LoRA r = 16": lambda: LoraConfig(r=16, target_modules=LINEARS),
}
WRAP, WRAP_EMPTY, PLAN = "get_peft_model", "get_peft_model(low_cpu_mem_usage=True)", "plan"
SECONDS, BYTES = 5.0, 200 * MIB  # the bars, of 7B


class Cost(NamedTuple):
    """Of one run: median seconds, and bytes at the peak beyond what was there."""

    seconds: float
    n_bytes: int


def llama(**shape: int) -> nn.Module:
    """Of a shape, on the meta device."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**shape))


def run(what: str, config: str, model: nn.Module) -> object:
    """Wrap, or plan."""
    if what == PLAN:
        return plan(model, CONFIGS[config]())
    return get_peft_model(model, CONFIGS[config](), low_cpu_mem_usage=what == WRAP_EMPTY)


def cost(what: str, config: str, shape: str, rounds: int = 5) -> Cost:
    """Of a run, in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_measure, args=(sender, what, config, shape, rounds))
    process.start()
    sender.close()  # so that a child that dies ends the wait
    result: Cost = receiver.recv()
    process.join()
    return result


def _measure(sender: Connection, what: str, config: str, shape: str, rounds: int) -> None:
    warnings.simplefilter("ignore")
    run(what, config, llama(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4))
    seconds, n_bytes = [], 0
    for first in [True] + [False] * (rounds - 1):
        model = llama(**SHAPES[shape])
        gc.collect()
        before = bytes_of_this_process("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start = time.perf_counter()
        result = run(what, config, model)
        seconds.append(time.perf_counter() - start)
        if first:
            n_bytes = bytes_of_this_process("VmHWM") - before
        del model, result
    sender.send(Cost(statistics.median(seconds), n_bytes))


def bars() -> list[Bar]:
    """The bars of 7B: seconds and memory of wrapping and planning."""
    found = []
    for config in ("HFT", "CoFiTune"):
        for what in (WRAP, PLAN):
            seconds, n_bytes = cost(what, config, "7B", rounds=3)
            name = f"{config}, {what}, 7B on the meta device"
            found.append(Bar(name, f"≤ {SECONDS:.0f} s", f"{seconds:.2f} s", seconds <= SECONDS))
            found.append(Bar(name, f"≤ {BYTES / MIB:.0f} MiB", f"{n_bytes / MIB:.1f} MiB", n_bytes <= BYTES))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        for config in CONFIGS:
            for what in (WRAP, WRAP_EMPTY) if config.startswith("LoRA") else (WRAP, PLAN):
                seconds, n_bytes = cost(what, config, shape)
                has_bar = shape == "7B" and not config.startswith("LoRA")
                rows.append(
                    {
                        "model": shape,
                        "config": config,
                        "what": what,
                        "s": f"{seconds:.3f}",
                        "MiB": f"{n_bytes / MIB:.1f}",
                        "bar": f"{SECONDS:.0f} s, {BYTES / MIB:.0f} MiB" if has_bar else "",
                    }
                )
    report("wrapping", rows)


if __name__ == "__main__":
    main()
