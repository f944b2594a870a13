"""What does FSDP2 over two processes save and cost, beside one process, and for the peers under the same FSDP2?

The bytes that each process keeps from step to step (its shards of parameters, gradients and Adam's state, and its
buffers), the peak of its resident memory (VmHWM, of a process of its own for each run; it includes the whole model
that is there before FSDP2 shards it, and the libraries' 0.4 GB), and seconds a step. Two
processes on gloo, prepared by accelerate, one thread each. "One process" has the whole model and the same batch as
each of the two, and runs in both of them at once, in turn with FSDP2: what it lacks is to gather and to scatter.
(Without a GPU accelerate turns FSDP2 off; here it is turned on by hand.)
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import interleaved, report
from peers import VOCABULARY, elements, freezing_half, full, half, llama, lora

RUNS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "full": full,
    "plain freezing of HFT's half": freezing_half,
    "LoRA": lora,
    "HFT": half,
    "1 % elements": lambda base: elements(base, 0.01),
}


def local(tensor: torch.Tensor) -> int:
    """Bytes of a tensor that are in this process."""
    shard = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard.numel() * shard.element_size()


def kept(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that a process keeps, by what they are for; to be asked between backward and step."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(map(local, parameters)),
        "buffers": sum(map(local, model.buffers())),
        "gradients": sum(local(p.grad) for p in parameters if p.grad is not None),
        "Adam": sum(local(t) for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)),
    }


class Run:
    """One model in training; `sharded` by FSDP2, or whole."""

    def __init__(self, name: str, args: argparse.Namespace, sharded: bool) -> None:
        self.model = RUNS[name](llama(args.hidden, args.layers, args.dtype)).train()
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        if sharded:
            self.model, optimizer = fsdp2().prepare(self.model, optimizer)
        self.optimizer = optimizer
        self.tokens = torch.randint(0, VOCABULARY, (args.batch, args.length))

    def backward(self) -> None:
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def fsdp2():
    """An Accelerator that has FSDP2 on the CPU."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def work(args: argparse.Namespace) -> dict[str, object]:
    """What one of two processes finds: of one run its memory, or of all of them the seconds a step."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    if args.memory is not None:
        run = Run(args.memory, args, args.sharded)
        run.step()
        run.step()
        run.backward()
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        found: dict[str, object] = {**kept(run.model, run.optimizer), "peak": peak * 1024}
    else:
        runs = {f"{name}/{sharded}": Run(name, args, sharded) for name in RUNS for sharded in (True, False)}
        steps = {name: run.step for name, run in runs.items()}
        found = dict(interleaved(steps, args.rounds, before=torch.distributed.barrier))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


def pair(*options: str) -> dict[str, float]:
    """Two processes of this script: the larger of what both found."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], *options, "--out", f"{folder}/{rank}"],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit("a process failed: see above")
        first, second = (json.loads(Path(folder, str(rank)).read_text()) for rank in range(2))
    return {name: max(value, second[name]) for name, value in first.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1, help="rows in each process")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", choices=["memory", "step"])
    parser.add_argument("--memory", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is not None:
        Path(args.out).write_text(json.dumps(work(args)))
        return
    suffix = "" if args.dtype == "float32" else f"_{args.dtype}"
    if args.only != "step":
        report(f"fsdp{suffix}", [memory_of(name) for name in RUNS])
    if args.only != "memory":
        seconds = pair()
        report(f"fsdp_step{suffix}", [step_of(name, seconds) for name in RUNS])


def memory_of(name: str) -> dict[str, object]:
    """A row: what a process keeps, and its peak."""
    one, two = (pair("--memory", name, *flag) for flag in ([], ["--sharded"]))
    peaks = [found.pop("peak") / 1e6 for found in (one, two)]
    return {
        "run": name,
        **{f"{what}, MB": f"{n / 1e6:.1f}" for what, n in two.items()},
        "all, of one process": f"{sum(two.values()) / sum(one.values()):.3f}",
        "peak, MB": f"{peaks[1]:.0f}",
        "peak of one process, MB": f"{peaks[0]:.0f}",
    }


def step_of(name: str, seconds: dict[str, float]) -> dict[str, object]:
    """A row: seconds a step."""
    one, two = seconds[f"{name}/False"], seconds[f"{name}/True"]
    return {
        "run": name,
        "s a step": f"{two:.3f}",
        "s, one process": f"{one:.3f}",
        "of one process": f"{two / one:.2f}",
        "of full": f"{two / seconds['full/True']:.3f}",
        "one process, of full": f"{one / seconds['full/False']:.3f}",
    }


if __name__ == "__main__":
    main()
