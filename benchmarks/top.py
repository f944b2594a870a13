"""What does the exact global top p % of |Δ| cost beside `torch.topk`, in time and memory, and does that grow?

Four kinds of models, in tensors of several shapes:

- `fp32`: a base of N(0, 0.02²) and Δ of N(0, 1e-4²), with hardly a tie;
- `bf16`: the same rounded to bf16, so that the differences are few numbers and many tie;
- `equal`: fp32, every |Δ| the same number; `still`: fp32, every Δ zero.

Times are medians of interleaved runs, in seconds of the processor, which other processes do not take part in: on one
thread of an idle machine they are the clock's. The peer is `torch.topk` of all |Δ| in one fp32 tensor: `of topk`
is the time beside building that tensor from the same pairs and running topk on it, `of topk alone` beside topk only.
There is no peer above `--topk-up-to` scalars: it takes 24 bytes a scalar.

Memory is that of one run in a process of its own, forked for every row where both models are there and what is free
was given back: the peak of its resident memory (VmHWM, set back before the run) less what was resident before. The
positions that the run returns, eight bytes each, are a column of their own and not part of `MiB beyond`.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from common import report

from peft_isolate.regions.top import top

Model = list[tuple[str, torch.Tensor, torch.Tensor]]

MIB = 2**20


def shapes(total: int) -> Iterator[tuple[int, ...]]:
    """Of about `total` scalars: an embedding of a quarter, then layers of a square, a fused tensor and a vector."""
    yield total // 4 // 1000, 1000
    side = int((total * 3 / 4 / 8 / 4) ** 0.5)
    for _ in range(8):
        yield side, side
        yield 3, side, side
        yield (side,)


def draw(kind: str, total: int) -> Model:
    """A model and its fine-tune, drawn piece by piece: no more memory is used than stays in use."""
    torch.manual_seed(0)
    model = []
    for i, shape in enumerate(shapes(total)):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        base, tuned = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        for base_piece, tuned_piece in zip(base.view(-1).split(MIB), tuned.view(-1).split(MIB), strict=True):
            if kind == "equal":
                tuned_piece.fill_(0.5)
                continue
            weights = torch.randn(base_piece.numel()).mul_(0.02)
            base_piece.copy_(weights)
            tuned_piece.copy_(weights if kind == "still" else weights.add_(torch.randn(weights.numel()), alpha=1e-4))
        model.append((f"w{i}", base, tuned))
    return model


def all_moves(model: Model) -> torch.Tensor:
    """|Δ| of a whole model in one fp32 tensor, without a copy that it could do without."""
    moves = torch.empty(sum(base.numel() for _, base, _ in model))
    start = 0
    for _, base, tuned in model:
        part = moves[start : start + base.numel()].view(base.shape)
        torch.sub(tuned.float(), base.float(), out=part).abs_()
        start += base.numel()
    return moves


def bytes_of_this_process(field: str) -> int:
    """VmRSS, what is resident now, or VmHWM, its peak since it was set back."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {field} in /proc/self/status: memory can be measured on Linux only")


def peak_beyond(model: Model, percent: float) -> int:
    """Bytes that a run takes at its peak, in a process forked here, beyond the model and its fine-tune."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def measure() -> None:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory that is free and resident would serve the run unseen
        Path("/proc/self/clear_refs").write_text("5")
        before = bytes_of_this_process("VmRSS")
        top(lambda: model, percent)
        sender.send(bytes_of_this_process("VmHWM") - before)

    process = fork.Process(target=measure)
    process.start()
    sender.close()  # so that a child that dies ends the wait
    peak = receiver.recv()
    process.join()
    return peak


def processor_seconds(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median of each run; one of each in turn, `rounds` times."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[2e7, 1e8, 4e8], help="scalars")
    parser.add_argument("--kinds", nargs="+", default=["fp32", "bf16", "equal", "still"])
    parser.add_argument("--percents", type=float, nargs="+", default=[0.1, 1.0, 5.0])
    parser.add_argument("--topk-up-to", type=float, default=1e8, help="scalars for which the peer is run")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    top(lambda: [("small", torch.zeros(100), torch.ones(100))], 50)  # the libraries' own first time, and their memory

    rows = []
    for kind in args.kinds:
        # Where all tie, the percent changes little.
        percents = args.percents if kind in ("fp32", "bf16") else [1.0]
        for size in map(int, args.sizes):
            model = draw(kind, size)
            moves = all_moves(model) if size <= args.topk_up_to else None
            for percent in percents:
                calls = []

                def pairs(model=model, calls=calls):
                    calls.append(None)
                    return model

                peak = peak_beyond(model, percent)
                result = top(pairs, percent)
                runs = {"top": lambda model=model, percent=percent: top(lambda: model, percent)}
                if moves is not None:
                    runs["alone"] = lambda moves=moves, k=result.count: torch.topk(moves, k)
                    runs["built"] = lambda model=model, k=result.count: torch.topk(all_moves(model), k)
                seconds = processor_seconds(runs, args.rounds)
                rows.append(
                    {
                        "kind": kind,
                        "scalars": result.total,
                        "percent": f"{percent:g}",
                        "selected": result.count,
                        "readings": len(calls),
                        "ns a scalar": f"{1e9 * seconds['top'] / result.total:.2f}",
                        "of topk": f"{seconds['top'] / seconds['built']:.3f}" if "built" in seconds else "",
                        "of topk alone": f"{seconds['top'] / seconds['alone']:.3f}" if "alone" in seconds else "",
                        "MiB positions": f"{8 * result.count / MIB:.0f}",
                        "MiB beyond": f"{(peak - 8 * result.count) / MIB:.0f}",
                    }
                )
    report("top", rows)


if __name__ == "__main__":
    main()
