"""What does counting the overlaps of core regions cost, by bit masks or by merging sorted positions?

Every pair of some tasks' positions in one tensor, drawn at random at each density. Both ways are timed interleaved, on
one core: from the positions on, so that the masks' time includes making them. `ratio` is the sorted way's time over
the masks': above 1 the masks are faster, and `regions.overlap.DENSE` is where they are for many tasks.
"""

from __future__ import annotations

import argparse

import numpy as np
from common import interleaved, report

from peft_isolate.regions.overlap import count_masked, count_sorted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scalars", type=int, default=2**25, help="of the tensor")
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 5, 20])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.0003, 0.001, 0.002, 0.003, 0.005, 0.01, 0.03])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    rows = []
    for tasks in args.tasks:
        for density in args.densities:
            draw = np.random.default_rng(0)
            count = round(density * args.scalars)
            lists = [
                np.unique(draw.integers(0, args.scalars, count, dtype=np.int32)) for _ in range(tasks)
            ]  # those drawn twice are few
            runs = {
                "sorted": lambda lists=lists: count_sorted(lists),
                "masks": lambda lists=lists: count_masked(lists, len(lists), args.scalars),
            }
            assert np.array_equal(runs["sorted"](), runs["masks"]())
            seconds = interleaved(runs, args.rounds, warmup=1)
            rows.append(
                {
                    "tasks": tasks,
                    "scalars": args.scalars,
                    "density": f"{density:g}",
                    **{f"{name} ms": f"{1e3 * value:.2f}" for name, value in seconds.items()},
                    "ratio": f"{seconds['sorted'] / seconds['masks']:.2f}",
                }
            )
    report("jaccard", rows)


if __name__ == "__main__":
    main()
