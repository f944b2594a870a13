"""How much memory does training take at its peak, beyond the weights, and what is kept alive for backward?

Three whole training steps on a Llama shape, each run in a process of its own. On the CPU: the peak of its resident
memory (VmHWM, set back once the model is wrapped) less what is resident when only the base is there and all code has
run once, on a tiny model. The process tells glibc to give back freed memory: blocks of 64 KiB and more are mapped each
on its own (M_MMAP_THRESHOLD), in one arena (M_ARENA_MAX); else what glibc keeps for later blurs the numbers by
hundreds of MiB. On CUDA: torch.cuda.max_memory_allocated, less what the base takes.

HFT beside plain freezing, which has no deltas: it may take their bytes more. Elements, exactly as many as SHiRA's,
beside LoRA of rank 16 and SHiRA. `peers.py` says what each trains, and in which dtype: over a bf16 base plain freezing
keeps bf16 gradients and bf16 moments, ours keep them in fp32, so there the bar asks for more than the same arithmetic.

`memory_kept.csv`: bytes that one adapted linear layer of 2048 × 768 keeps alive for backward beyond its input: the
storages that autograd saves, less parameters, buffers and whatever was there before the forward.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import peers
import torch
from common import Bar, device_name, report, results_name
from peft import get_peft_model
from step import DTYPES, arguments
from top import MIB, bytes_of_this_process
from torch import nn

from peft_isolate import CoreIsolationConfig

RUNS = {
    "full fine-tuning": peers.full,
    "plain freezing": peers.freezing_half,
    "HFT": peers.half,
    "1 % elements": peers.elements,
    "LoRA r = 16": peers.lora,
    "SHiRA": peers.shira,
}
WITH_BARS = ["plain freezing", "HFT", "1 % elements", "LoRA r = 16"]
SHAPE = (768, 8, 4, 256)  # width, layers, batch, length
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of malloc.h


def peak(run: str, dtype: str, device: str = "cpu", shape: tuple[int, int, int, int] = SHAPE) -> tuple[int, int]:
    """(bytes at the peak beyond the weights, bytes of what learns), of a process that trains for three steps."""
    server = multiprocessing.get_context("forkserver")  # which imports once, and never computes
    server.set_forkserver_preload(["peft_isolate", "transformers.models.llama.modeling_llama"])
    receiver, sender = server.Pipe(duplex=False)
    process = server.Process(target=_measure, args=(sender, run, dtype, device, shape))
    process.start()
    sender.close()  # so that a child that dies ends the wait
    result = receiver.recv()
    process.join()
    return result


def _measure(sender: Connection, run: str, dtype: str, device: str, shape: tuple[int, int, int, int]) -> None:
    libc = None if device != "cpu" else ctypes.CDLL("libc.so.6")
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, 2**16)
        libc.mallopt(M_ARENA_MAX, 1)
    width, layers, batch, length = shape
    small = peers.llama(128, 1, dtype, device)
    peers.step_of(RUNS[run](small), peers.inputs_of(small))()
    del small
    base = peers.llama(width, layers, dtype, device)
    inputs = peers.inputs_of(base, batch, length)
    before = _resident(libc)
    model = RUNS[run](base)
    step = peers.step_of(model, inputs)
    _resident(libc)
    if libc is None:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    at_peak = torch.cuda.max_memory_allocated() if libc is None else bytes_of_this_process("VmHWM")
    learns = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    sender.send((at_peak - before, learns))


def _resident(libc: ctypes.CDLL | None) -> int:
    """Bytes in use now, after what is free was given back."""
    gc.collect()
    if libc is None:
        return torch.cuda.memory_allocated()
    libc.malloc_trim(0)
    return bytes_of_this_process("VmRSS")


class One(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(768, 2048, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, 768) to (tokens, 2048)."""
        return self.up_proj(x)


def whole(base: nn.Module) -> nn.Module:
    """A delta on the whole of each of the seven matrices."""
    return get_peft_model(base, CoreIsolationConfig(target_modules=peers.LINEARS))


KEPT = {
    "whole": whole,
    "1 % elements": peers.elements,
    "all but 1 %": peers.all_but,
    "LoRA r = 16": peers.lora,
    "SHiRA": peers.shira,
    "Super-Tuning": peers.super_tuning,
}
OURS = ["whole", "1 % elements", "all but 1 %"]


def kept(run: str, dtype: str, compiled: bool, device: str = "cpu") -> tuple[int, int]:
    """(bytes that one adapted layer keeps alive for backward beyond its input, bytes of its weight)."""
    base = One().to(device, getattr(torch, dtype))
    weight = base.up_proj.weight
    model: nn.Module = KEPT[run](base)
    x = torch.randn(1024, 768, dtype=weight.dtype, device=device, requires_grad=True)
    call = torch.compile(model) if compiled else model
    call(x).sum().backward()  # what is made once, such as decoded positions, is there now
    gc.collect()
    there = {_address(each) for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and not each.is_meta}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if _address(tensor) not in there:
            saved[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call(x)
    assert output.requires_grad
    return sum(saved.values()), weight.numel() * weight.element_size()


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # a fake or a sparse one has none
        return 0


def bars() -> list[Bar]:
    """The bars of memory."""
    result = []
    for dtype in DTYPES:
        peaks = {run: peak(run, dtype) for run in WITH_BARS}
        (freezing, _), (half, deltas) = peaks["plain freezing"], peaks["HFT"]
        elements, lora = peaks["1 % elements"][0], peaks["LoRA r = 16"][0]
        result += [
            Bar(
                f"HFT, peak memory beyond the weights, {dtype}",
                f"≤ plain freezing's + the deltas' {deltas / MIB:.0f} MiB: {(freezing + deltas) / MIB:.0f} MiB",
                f"{half / MIB:.0f} MiB",
                half <= freezing + deltas,
            ),
            Bar(
                f"1 % elements, peak memory beyond the weights, {dtype}",
                f"≤ LoRA r = 16's {lora / MIB:.0f} MiB",
                f"{elements / MIB:.0f} MiB",
                elements <= lora,
            ),
        ]
    for compiled in (False, True):
        worst = max(n / of for dtype in DTYPES for run in OURS for n, of in [kept(run, dtype, compiled)])
        how = "compiled" if compiled else "eager"
        what = f"kept alive for backward per adapted layer beyond its input, {how}"
        result.append(Bar(what, "≤ 1 % of the weight's bytes", f"{worst:.2%}", worst <= 0.01))
    return result


def main() -> None:
    args = arguments(__doc__, without=["rounds"]).parse_args()
    rows, kept_rows = [], []
    for dtype in args.dtype:
        for run in RUNS:
            beyond, learns = peak(run, dtype, args.device, (args.hidden, args.layers, args.batch, args.length))
            mib = {"MiB that learn": f"{learns / MIB:.1f}", "MiB beyond the weights": f"{beyond / MIB:.0f}"}
            rows.append({"device": device_name(args.device), "dtype": dtype, "run": run, **mib})
        for run in KEPT:
            for compiled in (False, True):
                n, of = kept(run, dtype, compiled, args.device)
                numbers = {"bytes kept": n, "of the weight": f"{n / of:.4f}"}
                how = "compiled" if compiled else "eager"
                kept_rows.append(
                    {"device": device_name(args.device), "dtype": dtype, "run": run, "how": how, **numbers}
                )
    report(results_name("memory", args.device), rows)
    report(results_name("memory_kept", args.device), kept_rows)


if __name__ == "__main__":
    main()
