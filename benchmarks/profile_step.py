"""Where does the time of one training step go?

torch.profiler over one step (after two that are not looked at), each operator's own time added up by what it serves:

- `matrix products`: of the model and of our layers, forward and backward, dense gradients and attention among them;
- `composing`: W0 + Δ, in forward and again in backward;
- `sparse gradient`: that of single elements, but for a dense product that it is gathered from;
- `optimizer`: AdamW and zero_grad;
- `rest`: norms, activations, loss, autograd's own work.

`beyond operators` is the clock's time of the step less all of these: Python, and what the profiler itself takes.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import peers
import torch
from common import report
from step import arguments
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from peft_isolate.deltas import gradient, linear

RUNS = {
    "full fine-tuning": peers.full,
    "full fine-tuning of the matrices": peers.full_matrices,
    "HFT": peers.half,
    "CoFiTune, soft mask": peers.cofitune_masked,
    "1 % elements": peers.elements,
    "all but 1 %": peers.all_but,
    "SHiRA": peers.shira,
    "LoRA r = 16": peers.lora,
}
GROUPS = ("matrix products", "composing", "sparse gradient", "optimizer", "rest")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mkldnn_linear", "linear", "_mkl_linear", "matmul")


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Within, what our layers call to compose and for single elements is an event of its own in a profile."""
    with contextlib.ExitStack() as stack:
        for module, name, group in ((linear, "compose_into", GROUPS[1]), (gradient, "of_elements", GROUPS[2])):
            call = record_function(group)(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, call))
        yield


def group_of(event: FunctionEvent) -> str:
    """What an operator serves, by its own name and by those it was called in."""
    own = event.name.removeprefix("aten::")
    above: FunctionEvent | None = event
    while above is not None:
        if above.name.startswith("Optimizer."):
            return "optimizer"
        if above.name in GROUPS and own not in PRODUCTS:
            return above.name
        above = above.cpu_parent
    return "matrix products" if own in PRODUCTS or "attention" in own else "rest"


def profiled(make: peers.Make, base: nn.Module, inputs: torch.Tensor) -> tuple[Counter[str], Counter[str], float]:
    """({group: seconds}, {operator: seconds}, seconds of the clock) of one step."""
    step = peers.step_of(make(base), inputs)
    step()
    step()
    with named(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        step()
        clock = time.perf_counter() - start
    groups: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    for event in profiler.events():
        seconds = event.self_cpu_time_total / 1e6
        groups[group_of(event)] += seconds
        operators[f"{group_of(event)}: {event.name}"] += seconds
    return groups, operators, clock


def rows_of(run: str, dtype: str, groups: Counter[str], clock: float) -> Iterator[dict[str, str]]:
    """A row for each group."""
    groups["beyond operators"] = clock - sum(groups.values())
    for group in (*GROUPS, "beyond operators"):
        numbers = {"ms": f"{1e3 * groups[group]:.1f}", "of the step": f"{groups[group] / clock:.3f}"}
        yield {"dtype": dtype, "run": run, "group": group, **numbers}


def main() -> None:
    parser = arguments(__doc__, without=["rounds", "device"])
    parser.add_argument("--run", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--top", type=int, default=0, help="print so many operators of each run, too")
    args = parser.parse_args()
    rows = []
    for dtype in args.dtype:
        for run in args.run:
            base = peers.llama(args.hidden, args.layers, dtype)
            groups, operators, clock = profiled(RUNS[run], base, peers.inputs_of(base, args.batch, args.length))
            rows += rows_of(run, dtype, groups, clock)
            for name, seconds in operators.most_common(args.top):
                print(f"{dtype} {run}: {1e3 * seconds:8.1f} ms {name}")
    report("profile_step", rows)


if __name__ == "__main__":
    main()
