"""What does a step cost as the region grows, from 0.1 % to half of the elements?

Random elements of the seven matrices of each block, beside full fine-tuning of the same matrices: of the whole model,
and of its linear layers alone (`peers.Stack`). Medians of interleaved steps; `ratio` is the time over full
fine-tuning's. The curve shows where single elements stop paying, and that nothing jumps there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import peers
from common import Bar, device_name, report, results_name
from peers import Make
from step import DTYPES, arguments, seconds_of

PERCENTS = (0.1, 0.3, 1.0, 3.0, 10.0, 25.0, 50.0)
FULL = "full fine-tuning of the matrices"
BASES = {"model": peers.llama, "layers alone": peers.stack}


def curve(
    of: str, args: argparse.Namespace, dtype: str, percents: Sequence[float] = PERCENTS
) -> tuple[dict[float, float], float]:
    """({percent: seconds of a step}, seconds of full fine-tuning of the matrices)."""
    base = BASES[of](args.hidden, args.layers, dtype, args.device)
    makes: dict[str, Make] = {f"{p:g}": partial(peers.elements, share=p / 100) for p in percents}
    makes[FULL] = peers.full_matrices
    seconds = seconds_of(base, makes, peers.inputs_of(base, args.batch, args.length), args.rounds)
    return {p: seconds[f"{p:g}"] for p in percents}, seconds[FULL]


def bars() -> list[Bar]:
    """The curve of the layers alone, of a quarter of the depth: no number was set for it."""
    args = arguments(None).parse_args(["--layers", "2"])
    result = []
    for dtype in DTYPES:
        seconds, full = curve("layers alone", args, dtype)
        shown = ", ".join(f"{p:g} %: {s / full:.2f}" for p, s in seconds.items())
        what = f"elements, step of the layers alone as the region grows, × {FULL}, {dtype}"
        result.append(Bar(what, "a curve", shown, True))
    return result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--of", nargs="+", default=list(BASES), choices=list(BASES))
    args = parser.parse_args()
    rows = []
    for dtype in args.dtype:
        for of in args.of:
            seconds, full = curve(of, args, dtype)
            rows += [
                {
                    "device": device_name(args.device),
                    "dtype": dtype,
                    "of": of,
                    "percent": f"{percent:g}",
                    "ms a step": f"{1e3 * s:.1f}",
                    "ratio": f"{s / full:.3f}",
                }
                for percent, s in seconds.items()
            ]
    report(results_name("region_size", args.device), rows)


if __name__ == "__main__":
    main()
