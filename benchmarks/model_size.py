"""What does a step cost as the model grows, in depth and in width?

HFT beside plain freezing of the same matrices, and 1 % elements beside full fine-tuning of the seven matrices of each
block. The overhead is what a step takes beyond its peer's: as a ratio, and in milliseconds a layer. In depth it should
grow as the layers do, so that the milliseconds stay; the ratio also moves because the head is less of a step. In
width, two layers of each width stand for a model of as many as belong to it (`as in` names that model's size: the last
has the layers of one of 1 B), since a step of the whole would take minutes here. Medians of interleaved steps.

What wrapping and planning take as models grow, `wrapping.py` measures on the meta device.
"""

from __future__ import annotations

from typing import NamedTuple

import peers
from common import Bar, device_name, report, results_name
from step import DTYPES, ROUNDS, Pair, arguments, seconds_of

MAKES = {
    "HFT": peers.half,
    "plain freezing": peers.freezing_half,
    "1 % elements": peers.elements,
    "full fine-tuning of the matrices": peers.full_matrices,
}
PAIRS = [Pair("HFT", "plain freezing"), Pair("1 % elements", "full fine-tuning of the matrices")]
DEPTHS = (2, 4, 8, 16, 32)
SHALLOW, DEEP = 8, 32  # those of the bar
NARROW = 256


class Size(NamedTuple):
    """Width and layers of a whole model."""

    hidden: int
    layers: int


SIZES = {"10M": Size(256, 8), "70M": Size(768, 8), "200M": Size(1024, 16), "1B": Size(2048, 20)}


class Overhead(NamedTuple):
    """Of a run beyond its peer, in seconds of a step.

    Attributes:
        pair: Which two.
        run, peer: What a step of each takes.
        layers: How many there are.
    """

    pair: Pair
    run: float
    peer: float
    layers: int

    @property
    def a_layer(self) -> float:
        """Seconds beyond the peer's, for each layer."""
        return (self.run - self.peer) / self.layers


def overheads(
    hidden: int, layers: int, dtype: str, device: str, shape: tuple[int, int], rounds: int
) -> list[Overhead]:
    """Of each pair; the shape is (batch, length)."""
    base = peers.llama(hidden, layers, dtype, device)
    seconds = seconds_of(base, MAKES, peers.inputs_of(base, *shape), rounds)
    return [Overhead(pair, seconds[pair.run], seconds[pair.peer], layers) for pair in PAIRS]


def bars() -> list[Bar]:
    """A layer's step beyond the peer's may not grow with depth, but for 5 % of the peer's layer, which is noise."""
    result = []
    for dtype in DTYPES:
        at = {layers: overheads(NARROW, layers, dtype, "cpu", (4, 256), ROUNDS) for layers in (SHALLOW, DEEP)}
        for few, many in zip(at[SHALLOW], at[DEEP], strict=True):
            run, peer, _ = few.pair
            noise = 0.05 * many.peer / DEEP
            result.append(
                Bar(
                    f"{run}, a layer's step beyond {peer}'s, {SHALLOW} and {DEEP} layers, {dtype}",
                    f"does not grow with depth (± {1e3 * noise:.1f} ms)",
                    f"{1e3 * few.a_layer:+.1f} and {1e3 * many.a_layer:+.1f} ms",
                    many.a_layer <= few.a_layer + noise,
                )
            )
    return result


def main() -> None:
    args = arguments(__doc__, without=["hidden", "layers"]).parse_args()
    rows = []
    for dtype in args.dtype:
        models = [("depth", "", NARROW, layers) for layers in DEPTHS]
        models += [("width", name, size.hidden, 2) for name, size in SIZES.items()]
        for grows, whole, hidden, layers in models:
            shape = (args.batch, args.length)
            for overhead in overheads(hidden, layers, dtype, args.device, shape, args.rounds):
                rows.append(
                    {
                        "device": device_name(args.device),
                        "dtype": dtype,
                        "grows": grows,
                        "as in": whole,
                        "hidden": hidden,
                        "layers": layers,
                        "run": overhead.pair.run,
                        "peer": overhead.pair.peer,
                        "ratio": f"{overhead.run / overhead.peer:.3f}",
                        "extra ms a layer": f"{1e3 * overhead.a_layer:.2f}",
                    }
                )
    report(results_name("model_size", args.device), rows)


if __name__ == "__main__":
    main()
