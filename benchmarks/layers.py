"""What do the adapted linear layers alone cost, without attention, norms and head?

Forward, backward, AdamW and zero_grad of the linear layers of a Llama shape one after the other (`peers.Stack`),
medians of interleaved steps. About 1 % random elements, exactly as many of each matrix as SHiRA's, beside SHiRA, LoRA
of rank 16 and full fine-tuning of the same matrices. The columns are those of `step.py`.
"""

from __future__ import annotations

import peers
from common import Bar, report, results_name
from step import DTYPES, LORA, ROUNDS, SHIRA, Group, Pair, arguments, bars_of, rows_of, seconds_of

FULL = "full fine-tuning of the matrices"
GROUP = Group(
    {
        "1 % elements": peers.elements,
        "SHiRA": peers.shira,
        "LoRA r = 16": peers.lora,
        FULL: peers.full_matrices,
    },
    [SHIRA, LORA, Pair("1 % elements", FULL), Pair("LoRA r = 16", FULL)],
)


def bars() -> list[Bar]:
    """The bars of the adapted layers alone."""
    result: list[Bar] = []
    for dtype in DTYPES:
        base = peers.stack(dtype=dtype)
        makes, pairs = GROUP.with_bars(dtype)
        seconds = seconds_of(base, makes, peers.inputs_of(base), ROUNDS)
        result += bars_of(seconds, pairs, dtype, "the layers alone")
    return result


def main() -> None:
    args = arguments(__doc__).parse_args()
    rows = []
    for dtype in args.dtype:
        base = peers.stack(args.hidden, args.layers, dtype, args.device)
        inputs = peers.inputs_of(base, args.batch, args.length)
        rows += rows_of("layers", base, seconds_of(base, GROUP.makes, inputs, args.rounds), GROUP.pairs, inputs)
    report(results_name("layers", args.device), rows)


if __name__ == "__main__":
    main()
