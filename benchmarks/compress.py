"""How small does a packed adapter become, and how far are its weights from those it was packed from?

Deltas on the matrices of a Llama of a few layers: of a fine-tuning with AdamW in fp32, of which the base is a shorter
training on other text (bytes of this repository: its code, then its documentation), and drawn from a distribution.
`top` is the exact global top 1 % of |Δ|; `random` are 1 % of the positions at random; `half` are the rows of half of
the matrices' output units. Sizes are of a file of tensors as `compress` writes it, without what it carries beside.
Times are those of the processor in packing and unpacking, on one core, in nanoseconds a scalar. `rms` is the root mean
square of the error, over that of the deltas; `bar` is what was asked for.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import report
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_isolate.deltas.packed import Packing, pack, unpack
from peft_isolate.deltas.support import Support, delta_shape, read
from peft_isolate.regions.selection import Selection
from peft_isolate.regions.stored import storable

HERE = Path(__file__).parents[1]
BARS = {("elements", "bf16"): 2.5, ("elements", "int8"): 1.8, ("half", "int8"): 1.01}

Deltas = dict[str, torch.Tensor]


def text(*patterns: str) -> torch.Tensor:
    """The bytes of files of this repository."""
    files = sorted(path for pattern in patterns for path in HERE.glob(pattern))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def train(model: LlamaForCausalLM, data: torch.Tensor, steps: int, lr: float) -> None:
    """AdamW with a linear warm-up and decay, batches of 4 × 64 bytes."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 10, 1.0) * (1 - i / steps))
    for step in range(steps):
        starts = torch.randint(0, data.numel() - 64, (4,), generator=generator)
        ids = torch.stack([data[start : start + 64] for start in starts])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in (0, steps - 1):
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


def matrices(model: LlamaForCausalLM) -> Deltas:
    """{name: weight} of the layers' matrices."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}


def trained(args: argparse.Namespace) -> Deltas:
    """Δ of a fine-tuning."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=11 * args.hidden // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config)
    train(model, text("peft_isolate/**/*.py"), args.steps // 2, 5e-4)
    before = matrices(model)
    train(model, text("*.md", "docs/*.md"), args.steps, args.lr)
    return {name: weight - before[name] for name, weight in matrices(model).items()}


def selections(deltas: Deltas, kind: str, generator: torch.Generator) -> Iterator[tuple[str, Selection]]:
    """(name, what the adapter has of it)."""
    if kind == "top":
        size = torch.cat([delta.flatten().abs() for delta in deltas.values()])
        floor = torch.topk(size, size.numel() // 100).values[-1]
    for name, delta in deltas.items():
        n = delta.numel()
        if kind == "top":
            at = torch.nonzero(delta.flatten().abs() >= floor).flatten()
            yield name, Selection.elements(delta.shape, at)
        elif kind == "random":
            at = torch.randperm(n, generator=generator)[: n // 100].sort().values
            yield name, Selection.elements(delta.shape, at)
        else:
            rows = torch.randperm(delta.shape[0], generator=generator)[: delta.shape[0] // 2].sort().values
            yield name, Selection.rows(delta.shape, rows)


def measure(deltas: Deltas, kind: str, values: str, zstd: bool) -> dict[str, object]:
    """One row of the table."""
    tensors: Deltas = {}
    scalars = 0
    error = total = largest = absolute = pack_s = unpack_s = 0.0
    for name, selection in selections(deltas, kind, torch.Generator().manual_seed(1)):
        support, index = Support.of(selection)
        shape = delta_shape(selection.kind, selection.shape, selection.indices.numel())
        numbers = read(deltas[name], support, index, shape).contiguous()
        place = storable(selection)
        start = time.process_time()
        buffer, places = pack({"delta": numbers}, {"delta": place}, values, zstd)
        pack_s += time.process_time() - start
        start = time.process_time()
        found = unpack(buffer, Packing.of(values, buffer.numel(), places))["delta"].float()
        unpack_s += time.process_time() - start
        difference = (found - numbers).double()
        scalars += numbers.numel()
        error += difference.square().sum().item()
        absolute += difference.abs().sum().item()
        total += numbers.double().square().sum().item()
        largest = max(largest, difference.abs().max().item())
        tensors[f"base_model.model.{name}.packed"] = buffer
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/adapter", metadata={"format": "pt"})
        size = Path(folder, "adapter").stat().st_size
    bar = BARS.get(("half" if kind == "half" else "elements", values)) if zstd or kind == "half" else None
    return {
        "scalars": scalars,
        "values": values,
        "zstd": zstd,
        "bytes a scalar": f"{size / scalars:.3f}",
        "bar": "" if bar is None else bar,
        "largest error": f"{largest:.2e}",
        "mean error": f"{absolute / scalars:.2e}",
        "rms": f"{(error / total) ** 0.5:.2e}",
        "pack ns": f"{1e9 * pack_s / scalars:.0f}",
        "unpack ns": f"{1e9 * unpack_s / scalars:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()

    torch.set_num_threads(1)
    real = trained(args)
    torch.manual_seed(0)
    drawn = {
        "gaussian": lambda delta: 1e-4 * torch.randn_like(delta),
        "laplace": lambda delta: 1e-4 * torch.distributions.Laplace(0.0, 1.0).sample(delta.shape),
    }
    sources = {"AdamW": real} | {name: {key: f(d) for key, d in real.items()} for name, f in drawn.items()}
    rows = [
        {"deltas": name, "region": kind, **measure(deltas, kind, values, zstd)}
        for name, deltas in sources.items()
        for kind in ("top", "random", "half")
        for values in ("exact", "fp16", "bf16", "int8")
        for zstd in (True, False)
    ]
    report("compress", rows)


if __name__ == "__main__":
    main()
