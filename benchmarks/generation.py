"""What does generating one sequence cost with an adapter, merged and unmerged, beside the base and the peers?

Greedy decoding with a key-value cache, 32 new tokens after a prompt of 16, on a Llama shape, by `generate`. Elements:
exactly as many of each matrix as SHiRA's, about 1 %. Merged is `merge_adapter`: the wrapper stays around each layer,
and runs the base layer. Medians of interleaved runs; `ratio` is a run's time over its peer's, `bar` what it should
keep to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping

import peers
import torch
from common import Bar, device_name, interleaved, report, results_name
from step import DTYPES, Pair, arguments, in_both
from torch import nn


def merged(base: nn.Module) -> nn.Module:
    """Elements, merged by `merge_adapter`."""
    model = peers.elements(base)
    model.merge_adapter()
    return model


BASE, MERGED, OURS, SHIRA = "base", "1 % elements, merged", "1 % elements", "SHiRA"
WITH_BARS = {BASE: peers.full, MERGED: merged, OURS: peers.elements, SHIRA: peers.shira}
RUNS = WITH_BARS | {"HFT": peers.half, "LoRA r = 16": peers.lora}
PAIRS = [
    Pair(MERGED, BASE, in_both(1.05)),
    Pair(OURS, SHIRA, in_both(1.00)),
    Pair(OURS, BASE),
    Pair(SHIRA, BASE),
    Pair("HFT", BASE),
    Pair("LoRA r = 16", BASE),
]


def seconds_of(
    base: nn.Module, makes: Mapping[str, peers.Make], rounds: int, prompt: int = 16, new: int = 32
) -> dict[str, float]:
    """Median seconds in which each run generates."""
    tokens = peers.inputs_of(base, 1, prompt)

    def generating(model: nn.Module) -> Callable[[], object]:
        model.eval()
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings)

    return interleaved({name: generating(make(copy.deepcopy(base))) for name, make in makes.items()}, rounds)


def rows_of(base: nn.Module, seconds: Mapping[str, float], new: int) -> Iterator[dict[str, str]]:
    """A row for each pair."""
    like = next(base.parameters())
    dtype = str(like.dtype).removeprefix("torch.")
    for run, peer, limits in [Pair(BASE, BASE), *PAIRS]:
        yield {
            "model": f"{sum(p.numel() for p in base.parameters()) / 1e6:.0f}M",
            "dtype": dtype,
            "device": device_name(str(like.device)),
            "run": run,
            "ms a token": f"{1e3 * seconds[run] / new:.2f}",
            "tokens a second": f"{new / seconds[run]:.1f}",
            "peer": peer,
            "ratio": f"{seconds[run] / seconds[peer]:.3f}",
            "bar": f"{limits[dtype]:.2f}" if dtype in limits else "",
        }


def bars() -> list[Bar]:
    """The bars of generating, in both dtypes."""
    found = []
    for dtype in DTYPES:
        seconds = seconds_of(peers.llama(dtype=dtype), WITH_BARS, rounds=7, new=16)
        for run, peer, limits in PAIRS:
            if dtype in limits:
                ratio = seconds[run] / seconds[peer]
                found.append(Bar.ratio(f"{run}, generating, {dtype}", peer, limits[dtype], ratio))
    return found


def main() -> None:
    parser = arguments(__doc__, without=["batch", "length"])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=32)
    args = parser.parse_args()
    rows = []
    for dtype in args.dtype:
        base = peers.llama(args.hidden, args.layers, dtype, args.device)
        rows += rows_of(base, seconds_of(base, RUNS, args.rounds, args.prompt, args.new), args.new)
    report(results_name("generation", args.device), rows)


if __name__ == "__main__":
    main()
