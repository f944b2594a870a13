"""How large is the exact difference of two checkpoints, beside what others make of it?

A Llama of 10 M parameters is pretrained briefly on the demo's documents, which makes the base, and tuned on the demo's
instruction pairs in fp32 with AdamW, at each rate from the same base. Both are taken in fp32, and rounded to bf16.
Bytes are those of all tensors, without names and headers, and shares those of the tuned checkpoint. Times are CPU
time of single runs on one thread.

Without the package `deltatensors` its rows are left out: `pip install --target FOLDER --no-deps deltatensors`, and
FOLDER in PYTHONPATH. Of its modes, int4 is lossy, and sparse keeps as many differences as it is told to, in fp32: here
as many as there are in the tensor that changed most.

    OMP_NUM_THREADS=2 python benchmarks/exact.py
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_isolate.checkpoints import grid

sys.path.append(str(Path(__file__).parent.parent / "examples" / "demo"))
from common import report
from data import Document, documents, instruction_pairs, token_blocks

try:
    import deltatensors
except ImportError:
    deltatensors = None

DEMO = Path(__file__).parent.parent / "examples" / "demo"
State = dict[str, torch.Tensor]
LENGTH = 128


def train(model: LlamaForCausalLM, blocks: torch.Tensor, steps: int, rate: float, decay: float, seed: int) -> None:
    """AdamW on random batches of eight blocks, in place: a warm-up of twenty steps, then the same rate to the end."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    for _ in tqdm(range(steps), desc=f"at {rate:g}", mininterval=10):
        batch = blocks[torch.randint(len(blocks), (8,), generator=generator)]
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def checkpoints(args: argparse.Namespace) -> tuple[State, dict[float, State]]:
    """The base, and the tuned checkpoint of each rate, in fp32; from the folder where they are kept, if they are."""
    if args.keep:
        files = [args.keep / "base.pt", *(args.keep / f"t{rate:g}.pt" for rate in args.rates)]
        if all(file.is_file() for file in files):
            base, *others = (torch.load(file, weights_only=True) for file in files)
            return base, dict(zip(args.rates, others, strict=True))
    base, tuned = trained(args)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        torch.save(base, args.keep / "base.pt")
        for rate, state in tuned.items():
            torch.save(state, args.keep / f"t{rate:g}.pt")
    return base, tuned


def trained(args: argparse.Namespace) -> tuple[State, dict[float, State]]:
    """The base, and the tuned checkpoint of each rate, in fp32."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    texts = documents()
    general = token_blocks(tokenizer, [text for text in texts if not text.held_out], LENGTH)
    pairs = [Document("", pair["prompt"] + pair["completion"]) for pair in instruction_pairs(texts)[0]]
    task = token_blocks(tokenizer, pairs, LENGTH)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        )
    )
    train(model, general, args.pretraining, 1e-3, 0.1, seed=0)
    tuned = {}
    for rate in args.rates:
        again = copy.deepcopy(model)
        train(again, task, args.steps, rate, 0.01, seed=1)
        tuned[rate] = again.state_dict()
    return model.state_dict(), tuned


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and its seconds of CPU time, which other programs disturb less."""
    start = time.process_time()
    return run(), time.process_time() - start


def ours(base: State, tuned: State) -> tuple[int, float, State, float]:
    """(bytes, seconds to write, what comes back, seconds to read)."""
    found, write = timed(lambda: {name: grid.encode(base[name], tuned[name]) for name in base})
    back, read = timed(
        lambda: {name: base[name] if code is None else grid.decode(code, base[name]) for name, code in found.items()}
    )
    return sum(len(code) for code in found.values() if code is not None), write, back, read


def zstd_of_xor(base: State, tuned: State, level: int, planes: bool) -> tuple[int, float, State, float]:
    """Of all tensors' bytes in one stream, as they are or with those of equal significance side by side."""
    size = next(iter(base.values())).element_size()

    def flat(state: State) -> np.ndarray:
        return np.concatenate([tensor.reshape(-1).view(torch.uint8).numpy() for tensor in state.values()])

    def write() -> bytes:
        xor = flat(base) ^ flat(tuned)
        return zstandard.compress(xor.reshape(-1, size).T.tobytes() if planes else xor.data, level)

    def read(frame: bytes) -> State:
        xor = np.frombuffer(zstandard.decompress(frame), np.uint8)
        xor = np.ascontiguousarray(xor.reshape(size, -1).T).reshape(-1) if planes else xor
        parts = torch.from_numpy(flat(base) ^ xor).split([tensor.nbytes for tensor in base.values()])
        return {
            name: part.view(tensor.dtype).reshape(tensor.shape)
            for (name, tensor), part in zip(base.items(), parts, strict=True)
        }

    frame, seconds = timed(write)
    back, seconds_to_read = timed(lambda: read(frame))
    return len(frame), seconds, back, seconds_to_read


def of_deltatensors(base: State, tuned: State, **strategy: Any) -> tuple[int, float, State, float]:
    """The package's own file; it works in fp32, and what it gives is rounded to the checkpoint's dtype."""
    old, new = ({name: tensor.float() for name, tensor in state.items()} for state in (base, tuned))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / "difference.wdelta"
        _, write = timed(lambda: deltatensors.save_delta(path, new, old, **strategy))
        size = path.stat().st_size
        found, read = timed(lambda: deltatensors.load_delta(path, old))
    back = {name: torch.as_tensor(found[name]).to(tensor.dtype).reshape(tensor.shape) for name, tensor in base.items()}
    return size, write, back, read


def different(one: State, other: State) -> int:
    """Scalars of which any bit differs."""
    return sum(int((grid._patterns(one[name]) != grid._patterns(other[name])).sum()) for name in one)


def rows_of(rate: float, base: State, tuned: State) -> list[dict[str, object]]:
    """One row a way."""
    n_scalars = sum(tensor.numel() for tensor in base.values())
    n_bytes = sum(tensor.nbytes for tensor in base.values())
    changed = max(different({"": base[name]}, {"": tuned[name]}) / base[name].numel() for name in base)
    ways = {
        "grid/1": lambda: ours(base, tuned),
        "zstd -19 of the XOR": lambda: zstd_of_xor(base, tuned, 19, planes=False),
        "zstd -3 of the XOR": lambda: zstd_of_xor(base, tuned, 3, planes=False),
        "zstd -19 of the XOR's planes": lambda: zstd_of_xor(base, tuned, 19, planes=True),
    }
    if deltatensors:
        ways["deltatensors sparse"] = lambda: of_deltatensors(base, tuned, strategy="sparse", sparsity=1 - changed)
        ways["deltatensors int4 (lossy)"] = lambda: of_deltatensors(base, tuned, strategy="int4")
    shared = {
        "dtype": str(next(iter(base.values())).dtype).removeprefix("torch."),
        "rate": f"{rate:g}",
        "changed": f"{different(base, tuned) / n_scalars:.4f}",
    }
    nothing = {"wrong scalars": 0, "write s": "", "read s": ""}
    rows = [{**shared, "way": "the tuned checkpoint", "bytes": n_bytes, "share": "1.0000", **nothing}]
    for way, run in tqdm(ways.items(), desc=f"{shared['dtype']} at {rate:g}"):
        size, write, back, read = run()
        measured = {"wrong scalars": different(back, tuned), "write s": f"{write:.2f}", "read s": f"{read:.2f}"}
        rows.append({**shared, "way": way, "bytes": size, "share": f"{size / n_bytes:.4f}", **measured})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining", type=int, default=300, help="optimizer steps that make the base")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each tuning")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4])
    parser.add_argument("--keep", type=Path, help="folder for the trained checkpoints; they are taken from it again")
    args = parser.parse_args()
    if deltatensors is None:
        print("deltatensors is not installed: its rows are left out (--help says how to have them)")
    base, tuned = checkpoints(args)
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        rounded = {name: tensor.to(dtype) for name, tensor in base.items()}
        for rate, state in tuned.items():
            rows += rows_of(rate, rounded, {name: tensor.to(dtype) for name, tensor in state.items()})
    report("exact", rows)


if __name__ == "__main__":
    main()
