"""How small are gap codes, and how fast are they written and read?

Positions drawn at random at each density, as many as asked for; times are the best of several rounds, in nanoseconds a
position, on one core. The entropy is that of a random subset, H(d)/d bits a position at density d.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
from common import report

from peft_isolate.regions.codes import check, decode, encode


def best(run: Callable[[], object], rounds: int) -> float:
    """Least seconds of several rounds: there is one right amount of work, all else is the machine's disturbance."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10**7, help="positions to draw at each density")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--densities", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.5]
    )
    args = parser.parse_args()

    rows = []
    for density in args.densities:
        steps = np.random.default_rng(0).geometric(density, args.count)
        positions = np.cumsum(steps) - 1
        numel = int(positions[-1]) + 1
        if numel < 2**31:
            positions = positions.astype(np.int32)
        code, format = encode(positions, numel)
        assert np.array_equal(decode(code, format, args.count, numel), positions)
        runs = {
            "encode": lambda positions=positions, numel=numel: encode(positions, numel),
            "decode": lambda code=code, format=format, numel=numel: decode(code, format, args.count, numel),
            "check": lambda code=code, format=format, numel=numel: check(code, format, args.count, numel),
        }
        nanoseconds = {name: 1e9 * best(run, args.rounds) / args.count for name, run in runs.items()}
        entropy = -(math.log2(density) + (1 - density) / density * math.log2(1 - density))
        rows.append(
            {
                "density": f"{density:g}",
                "positions": args.count,
                "dtype": positions.dtype,
                "format": format,
                "bytes a position": f"{code.size / args.count:.4f}",
                "of the entropy": f"{8 * code.size / args.count / entropy:.4f}",
                **{f"{name} ns": f"{value:.2f}" for name, value in nanoseconds.items()},
            }
        )
    report("codes", rows)


if __name__ == "__main__":
    main()
