"""When does it pay to compute the gradient of single elements alone, instead of gathering it from the dense one?

`by_product` makes the dense gradient in one product of matrices and gathers; `by_samples` computes a scalar product
for each element (`torch.sparse.sampled_addmm`). Over densities, dtypes and numbers of tokens, interleaved; what the
library chooses by its own clock stands beside them.
"""

from __future__ import annotations

import argparse
import functools

import torch
from common import interleaved, report, results_name

from peft_isolate.deltas import gradient

DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=768)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in args.tokens:
            left, right = (
                torch.randn(tokens, n, device=args.device).to(dtype) for n in (args.rows, args.columns)
            )  # fmt: skip
            for density in DENSITIES:
                numel = args.rows * args.columns
                positions = torch.randperm(numel)[: int(density * numel)].sort().values.int().to(args.device)
                case = (left, right, positions)
                gradient.of_elements(*case)
                seconds = interleaved(
                    {
                        way.__name__: functools.partial(way, *case)
                        for way in (gradient.by_product, gradient.by_samples)
                    },
                    args.rounds,
                )
                product, samples = seconds["by_product"], seconds["by_samples"]
                rows.append({
                    "dtype": str(dtype).removeprefix("torch."),
                    "tokens": tokens,
                    "density": density,
                    "ms by product": f"{1e3 * product:.2f}",
                    "ms by samples": f"{1e3 * samples:.2f}",
                    "ratio": f"{samples / product:.2f}",
                    "chosen": list(gradient._chosen.values())[-1].__name__ if gradient._chosen else "by_product",
                })  # fmt: skip
                gradient._chosen.clear()
    report(results_name("gradient", args.device), rows)


if __name__ == "__main__":
    main()
