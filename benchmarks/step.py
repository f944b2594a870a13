"""What does a training step cost beside what a user would train instead?

Forward, backward, AdamW and zero_grad on a Llama shape, medians of interleaved steps. What belongs together is timed
together:

- `hft`: HFT beside plain freezing of the same matrices and beside full fine-tuning. Plain freezing is the ideal: it
  trains the same numbers but keeps no base, so that nothing can be unmerged, disabled or shared as a difference.
- `cofitune`: CoFiTune's default region without and with a soft mask, beside plain freezing of that region.
- `elements`: about 1 % random elements of the seven matrices of each block, exactly as many of each as SHiRA's, beside
  SHiRA, LoRA of rank 16, Super-Tuning at 1 %, and OSF as it comes, which trains far more.
- `all_but`: a stage of CPI-FT, these matrices but for 1 %, beside full fine-tuning of them.

`peers.py` says what each trains, and in which dtype. Each row is a run beside one peer; `ratio` is its time over the
peer's, `bar` what it should keep to.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import peers
import torch
from common import Bar, device_name, interleaved, report, results_name
from peers import Make
from torch import nn

DTYPES = ("float32", "bfloat16")
ROUNDS = 7


class Pair(NamedTuple):
    """A run, the peer that it is compared with, and {dtype: how many times the peer's time it may take}."""

    run: str
    peer: str
    limits: Mapping[str, float] = {}


class Group(NamedTuple):
    """Runs that are timed together, and which of them are compared."""

    makes: Mapping[str, Make]
    pairs: Sequence[Pair]

    def with_bars(self, dtype: str) -> Group:
        """Only what there is a bar for in this dtype."""
        pairs = [pair for pair in self.pairs if dtype in pair.limits]
        named = {name for pair in pairs for name in pair[:2]}
        return Group({name: make for name, make in self.makes.items() if name in named}, pairs)


def in_both(limit: float) -> dict[str, float]:
    """The same bar in both dtypes."""
    return dict.fromkeys(DTYPES, limit)


SHIRA = Pair("1 % elements", "SHiRA", {"float32": 0.80, "bfloat16": 0.90})
LORA = Pair("1 % elements", "LoRA r = 16", {"float32": 1.00})
GROUPS = {
    "hft": Group(
        {
            "full fine-tuning": peers.full,
            "plain freezing": peers.freezing_half,
            "HFT": peers.half,
        },
        [
            Pair("HFT", "plain freezing", {"float32": 1.05}),
            Pair("HFT", "full fine-tuning", {"float32": 0.88}),
            Pair("plain freezing", "full fine-tuning"),
        ],
    ),
    "cofitune": Group(
        {
            "plain freezing": peers.freezing_cofitune,
            "CoFiTune": peers.cofitune,
            "CoFiTune, soft mask": peers.cofitune_masked,
        },
        [
            Pair("CoFiTune", "plain freezing"),
            Pair("CoFiTune, soft mask", "plain freezing", {"float32": 1.05}),
        ],
    ),
    "elements": Group(
        {
            "1 % elements": peers.elements,
            "SHiRA": peers.shira,
            "LoRA r = 16": peers.lora,
            "Super-Tuning": peers.super_tuning,
            "OSF": peers.osf,
        },
        [SHIRA, LORA, Pair("1 % elements", "Super-Tuning"), Pair("1 % elements", "OSF")],
    ),
    "all_but": Group(
        {"full fine-tuning of the matrices": peers.full_matrices, "all but 1 %": peers.all_but},
        [Pair("all but 1 %", "full fine-tuning of the matrices", {"float32": 1.05})],
    ),
}


def seconds_of(base: nn.Module, makes: Mapping[str, Make], inputs: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each run, one of each in turn, each on a copy of the base."""
    steps = {name: peers.step_of(make(copy.deepcopy(base)), inputs) for name, make in makes.items()}
    return interleaved(steps, rounds, warmup=1)  # the first step makes all that is made once


def rows_of(
    group: str, base: nn.Module, seconds: Mapping[str, float], pairs: Sequence[Pair], inputs: torch.Tensor
) -> Iterator[dict[str, str]]:
    """A row for each pair, then one for each run that is only a peer."""
    like = next(base.parameters())
    dtype = str(like.dtype).removeprefix("torch.")
    n_tokens = inputs.shape[0] if inputs.is_floating_point() else inputs.numel()
    alone = [Pair(name, "") for name in seconds if name not in {pair.run for pair in pairs}]
    for run, peer, limits in [*pairs, *alone]:
        yield {
            "model": f"{sum(p.numel() for p in base.parameters()) / 1e6:.0f}M",
            "dtype": dtype,
            "device": device_name(str(like.device)),
            "tokens": str(n_tokens),
            "group": group,
            "run": run,
            "ms a step": f"{1e3 * seconds[run]:.1f}",
            "tokens a second": f"{n_tokens / seconds[run]:.0f}",
            "peer": peer,
            "ratio": f"{seconds[run] / seconds[peer]:.3f}" if peer else "",
            "bar": f"{limits[dtype]:.2f}" if dtype in limits else "",
        }


def bars_of(seconds: Mapping[str, float], pairs: Sequence[Pair], dtype: str, what: str) -> Iterator[Bar]:
    """The bars of these pairs in this dtype."""
    for run, peer, limits in pairs:
        if dtype in limits:
            yield Bar.ratio(f"{run}, {what}, {dtype}", peer, limits[dtype], seconds[run] / seconds[peer])


def bars() -> list[Bar]:
    """The bars of a step of the whole model."""
    result: list[Bar] = []
    for dtype in DTYPES:
        base = peers.llama(dtype=dtype)
        inputs = peers.inputs_of(base)
        for group in GROUPS.values():
            makes, pairs = group.with_bars(dtype)
            result += bars_of(seconds_of(base, makes, inputs, ROUNDS), pairs, dtype, "step")
    return result


def arguments(doc: str | None, without: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The options that the benchmarks of training share, but for some."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 768, "layers": 8, "batch": 4, "length": 256, "rounds": ROUNDS}.items():
        if name not in without:
            parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES))
    if "device" not in without:
        parser.add_argument("--device", default="cpu")
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--group", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    args = parser.parse_args()
    rows = []
    for dtype in args.dtype:
        base = peers.llama(args.hidden, args.layers, dtype, args.device)
        inputs = peers.inputs_of(base, args.batch, args.length)
        for name in args.group:
            group = GROUPS[name]
            rows += rows_of(name, base, seconds_of(base, group.makes, inputs, args.rounds), group.pairs, inputs)
    report(results_name("step", args.device), rows)


if __name__ == "__main__":
    main()
