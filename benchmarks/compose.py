"""What does composing W0 + Δ cost, in how large chunks, and in fresh or in shared memory?

The chunk matters where the dtypes differ (a bf16 base, an fp32 delta): the fp32 copy of a chunk that fits the cache
costs little, one of the whole weight goes through memory twice. The rows of the table are chunk sizes in scalars; 0 is
the whole weight in one piece. "shared" is the library's chunk, into the buffer that all layers share (`scratch.py`);
all others make memory anew.
"""

from __future__ import annotations

import argparse

import torch
from common import interleaved, report

from peft_isolate.deltas import compose as module
from peft_isolate.deltas.compose import compose, compose_into
from peft_isolate.deltas.scratch import scratch_like, shared
from peft_isolate.deltas.support import Support
from peft_isolate.deltas.terms import Terms
from peft_isolate.regions import Selection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    held = shared()  # as a layer does
    shape = (args.size, args.size)
    support, index = Support.of(Selection.whole(shape))
    delta = torch.randn(shape, device=args.device) * 1e-3
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        w0 = torch.randn(shape, device=args.device).to(dtype)
        terms = Terms([delta], [1.0], [support], [index.to(args.device)], [delta.new_empty(0)], [False])

        def with_chunk(chunk: int, w0=w0, terms=terms):
            def run():
                original, module.CHUNK = module.CHUNK, chunk or w0.numel()
                try:
                    return compose(w0, terms)
                finally:
                    module.CHUNK = original

            return run

        runs = {str(chunk): with_chunk(chunk) for chunk in (2**14, 2**16, 2**18, 2**20, 2**22, 0)}
        runs["shared"] = lambda w0=w0, terms=terms: compose_into(scratch_like(w0), w0, terms)
        runs["copy of W0"] = w0.clone
        seconds = interleaved(runs, args.rounds)
        rows += [
            {
                "dtype": str(dtype)[6:],
                "chunk": name,
                "ms": f"{1e3 * s:.1f}",
                "of a copy": f"{s / seconds['copy of W0']:.2f}",
            }
            for name, s in seconds.items()
        ]
    del held
    report("compose" if args.device == "cpu" else f"compose_{args.device}", rows)


if __name__ == "__main__":
    main()
