"""Two processes on CPU (gloo): `pair` starts them and brings back what each of them found.

Starting a process costs seconds of imports, so one pair runs several jobs, one after the other. A job is a function of
this module that both processes call with the same arguments; what it returns, or raises, comes back by torch.save.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[2]
STEPS = 4
BATCH = 4
# After one process has failed, the other may wait for it for ever.
GRACE = 10.0


def pair(
    jobs: list[tuple[str, dict]],
    folder: Path,
    timeout: float = 120.0,
    module: str = "tests.training.distributed_worker",
) -> list[list[Any]]:
    """Run the jobs in two processes.

    Args:
        jobs: (name of a function of `module`, its arguments).
        folder: Where the processes write; its `out` is the same as their working directory.
        timeout: Seconds after which both are killed.
        module: What the processes run.

    Returns:
        For each job what the two processes returned: a value, or the exception that it ended in.

    Raises:
        AssertionError: A process died, or did not end in time. With what both of them printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(jobs, folder / "jobs.pt")
    paths = [str(ROOT), *(str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(":") if path)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": ":".join(paths),
    }  # fmt: skip
    logs = [folder / f"log-{rank}.txt" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as sink:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, str(folder)],
                        env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
                    )
                )  # fmt: skip
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                deadline = min(deadline, time.monotonic() + GRACE)
            time.sleep(0.05)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
    said = "\n".join(
        f"--- process {rank} ({codes[rank]}):\n{log.read_text()[-6000:]}" for rank, log in enumerate(logs)
    )
    assert codes == [0, 0], f"the processes ended with {codes} (None: killed after {timeout} s)\n{said}"
    results = [
        [torch.load(folder / f"{i}-{rank}.pt", weights_only=False) for rank in range(2)] for i in range(len(jobs))
    ]
    return results


def main(folder: Path, functions: Mapping[str, Callable[..., Any]]) -> None:
    """One process: all the jobs, by these names."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    for i, (name, arguments) in enumerate(torch.load(folder / "jobs.pt", weights_only=False)):
        try:
            with patch.dict(os.environ):
                result = functions[name](folder / str(i), **arguments)
        except Exception as error:
            import traceback

            traceback.print_exc()
            result = error.with_traceback(None)
        torch.save(result, folder / f"{i}-{rank}.pt")
        gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def batches() -> list[torch.Tensor]:
    """The full batches of a run."""
    from tests.models import tokens

    return [tokens(BATCH, 12, seed=seed) for seed in range(STEPS)]


def build(what: str, dtype: str = "float32", seed: int = 0):
    """A tiny Llama with an adapter, the same in every process.

    Args:
        what: "hft", "masked" (CoFiTune with a soft mask), or a kind of `GivenConfig`; with "_round" after one round
            in this process alone, so that numbers are held.
        dtype: Of the base.
        seed: Of the draw.
    """
    from peft import get_peft_model

    from peft_isolate import CoFiTuneConfig, HalfFTConfig, next_round
    from peft_isolate.deltas.adapters import rearrange, regions_of
    from tests.given import GivenConfig
    from tests.importances import importance
    from tests.models import tiny

    torch.manual_seed(0)
    base = tiny()
    if dtype == "bfloat16":
        to_bf16(base)
    kind = what.removesuffix("_round")
    if kind == "masked":
        config = CoFiTuneConfig(layer_range=(0, 1), modules="MHA+FFN", importance=importance(seed=seed))
    else:
        config = HalfFTConfig(seed=seed) if kind == "hft" else GivenConfig(kind=kind, seed=seed)
    model = get_peft_model(base, config).train()
    if what.endswith("_round"):
        steps(model, optimizer(model), batches()[:2])
        if what == "hft_round":
            next_round(model)
        else:
            learned, _ = regions_of(model, "default")
            trained = GivenConfig(kind=kind, seed=seed + 1).choose(model)
            rearrange(model.base_model, "default", trained, learned - trained)
    return model


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with weight decay on whatever learns."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.1)


def steps(model, optimizer, batches, backward=torch.Tensor.backward, parts: int = 1) -> list[float]:
    """Train on each batch once, accumulated over `parts` of it; the losses."""
    losses = []
    for batch in batches:
        for part in batch.chunk(parts):
            loss = model(input_ids=part, labels=part).loss / parts
            backward(loss)
            losses.append(loss.item() * parts)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def single(what: str, folder: Path, dtype: str = "float32", parts: int = 1, rounded: bool = False):
    """The same run in one process: the model, which is also saved to `folder`.

    Args:
        what, dtype: See `build`.
        folder: Where to.
        parts: 1 computes each batch as one; 2 adds the gradients of its halves, as two processes do.
        rounded: Compute with W0 and every Δ rounded to bf16, as FSDP2's mixed precision hands them over.
    """
    from peft_isolate.deltas.delta import Delta

    model = build(what, dtype)
    as_they_are = Delta.parts
    with ExitStack() as stack:
        if rounded:
            to_bf16(model.get_base_model())
            bf16_parts = lambda delta: ((n.to(torch.bfloat16), *rest) for n, *rest in as_they_are(delta))  # noqa: E731
            stack.enter_context(patch.object(Delta, "parts", bf16_parts))
        steps(model, optimizer(model), batches(), parts=parts)
    model.save_pretrained(folder)
    return model


def to_bf16(model: torch.nn.Module) -> None:
    """Of a base, or of one that is wrapped. Not the buffers: neither does FSDP's mixed precision."""
    for name, parameter in model.named_parameters():
        if ".default." not in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def reset() -> None:
    """Accelerate's state of the job before; the process group stays."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def fsdp2_plugin(efficient: bool = False, checkpointing: bool = False):
    """FSDP2 as `accelerate launch` would configure it; `efficient` is its cpu_ram_efficient_loading."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=efficient,
        state_dict_type="FULL_STATE_DICT",
        reshard_after_forward=True,
        activation_checkpointing=checkpointing,
    )


def turn_to_fsdp(state: Any, plugin: Any) -> None:
    """What accelerate's state does by itself on accelerators only, never on CPU."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    if state._mixed_precision != "no":
        plugin.set_mixed_precision(state._mixed_precision)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin


def accelerator(mode: str, mixed: str | None = None, efficient: bool = False, checkpointing: bool = False):
    """A fresh Accelerator for "ddp" or "fsdp2"."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    reset()
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=60))
    plugin = fsdp2_plugin(efficient, checkpointing) if mode == "fsdp2" else None
    made = Accelerator(cpu=True, mixed_precision=mixed, fsdp_plugin=plugin, kwargs_handlers=[patience])
    if plugin is not None:
        turn_to_fsdp(made.state, plugin)
    return made


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[int]]:
    """How often a method is called."""
    calls: list[int] = []
    method = getattr(owner, name)

    def counting(*args, **kwargs):
        calls.append(1)
        return method(*args, **kwargs)

    with patch.object(owner, name, counting):
        yield calls


def trained(
    folder: Path,
    mode: str,
    what: str,
    dtype: str = "float32",
    mixed: str | None = None,
    efficient: bool = False,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Each process trains on its half of each batch; the main one saves as Trainer does.

    Args:
        folder: Where to.
        mode: "ddp" or "fsdp2".
        what, dtype: See `build`.
        mixed: accelerate's mixed precision.
        efficient, checkpointing: FSDP's cpu_ram_efficient_loading and activation_checkpointing.

    Returns:
        `state`: the whole state dict, gathered (in the main process); `type`: accelerate's name of what it did;
        `decoded`: how often positions were decoded after the first step; `paths`: {layer: its path in the forward};
        `synced`: the buffers that DDP sends around.
    """
    from peft_isolate.deltas import DeltaLayer
    from peft_isolate.regions.stored import StoredSelection

    made = accelerator(mode, mixed, efficient, checkpointing)
    model = build(what, dtype)
    model, optim = made.prepare(model, optimizer(model))
    paths: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, DeltaLayer):
            module.register_forward_hook(lambda layer, *_, name=name: paths.update({name: layer.path}))
    halves = [batch.chunk(2)[made.process_index] for batch in batches()]
    steps(model, optim, halves[:1], made.backward)
    with counted(StoredSelection, "decode") as decoded:
        steps(model, optim, halves[1:], made.backward)
    found = {"type": made.distributed_type.value, "decoded": len(decoded), "paths": paths, "synced": []}
    inner = made.unwrap_model(model)
    if mode == "ddp":
        names = {id(buffer): name for name, buffer in inner.named_buffers()}
        found["synced"] = [names[id(buffer)] for buffer in model.modules_buffers]
        found["state"] = inner.state_dict()
        if made.is_main_process:
            inner.save_pretrained(folder)
    else:
        found["state"] = made.get_state_dict(model)
        inner.save_pretrained(folder, state_dict=dict(found["state"]), is_main_process=made.is_main_process)
    made.wait_for_everyone()
    return found


def kept(folder: Path, mode: str | None, what: str) -> dict[str, int]:
    """Bytes that are in this process between backward and step, of what it keeps from step to step, by its kind."""
    model = build(what)
    optim = optimizer(model)
    if mode is not None:
        made = accelerator(mode)
        model, optim = made.prepare(model, optim)
    steps(model, optim, batches()[:1])
    batch = batches()[1]
    model(input_ids=batch, labels=batch).loss.backward()

    def of(tensors) -> int:
        # A tensor of FSDP2's is as large as the whole; what is here is its shard.
        here = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
        return sum(tensor.numel() * tensor.element_size() for tensor in here)

    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = [tensor for state in optim.state.values() for tensor in state.values() if tensor.ndim]
    return {
        "frozen": of(parameter for parameter in model.parameters() if not parameter.requires_grad),
        "learning": of(learning),
        "gradients": of(parameter.grad for parameter in learning),
        "Adam": of(moments),
        "buffers": of(model.buffers()),
    }


def differently(folder: Path, mode: str, what: str) -> None:
    """Each process draws its own region."""
    made = accelerator(mode)
    model = build(what, seed=made.process_index)
    made.prepare(model, optimizer(model))


def change_sharded(folder: Path) -> dict[str, Any]:
    """What a sharded adapter is asked for in vain.

    Returns:
        `errors`: {what was called: its exception, or None}; `before`, `after`: the gathered state.
    """
    from peft_isolate import half_reset, next_round

    made = accelerator("fsdp2")
    model = build("hft")
    model, optim = made.prepare(model, optimizer(model))
    steps(model, optim, [batches()[0].chunk(2)[made.process_index]], made.backward)
    calls = {
        "merge_adapter": model.merge_adapter,
        "merge_and_unload": model.merge_and_unload,
        "next_round": lambda: next_round(model),
        "half_reset": lambda: half_reset(model),
        "add_weighted_adapter": lambda: model.add_weighted_adapter(["default"], [1.0], "other"),
    }
    found: dict[str, Any] = {"before": made.get_state_dict(model), "errors": {}}
    for name, call in calls.items():
        found["errors"][name] = None
        try:
            call()
        except Exception as error:
            found["errors"][name] = error.with_traceback(None)
    return found | {"after": made.get_state_dict(model)}


def holes_written_to(folder: Path) -> None:
    """An optimizer that wrote to the holes, under FSDP's own activation checkpointing, which renames the modules."""
    made = accelerator("fsdp2", checkpointing=True)
    model = build("all_but")
    model, optim = made.prepare(model, optimizer(model))
    steps(model, optim, [batches()[0].chunk(2)[made.process_index]], made.backward)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(7.0)
    state = made.get_state_dict(model)
    made.unwrap_model(model).save_pretrained(folder, state_dict=state, is_main_process=made.is_main_process)
    made.wait_for_everyone()


def one_dies(folder: Path) -> None:
    """The other waits for it."""
    accelerator("ddp")
    if os.environ["RANK"] == "1":
        print("the last words of process 1", flush=True)
        os._exit(3)
    torch.distributed.barrier()


def sft(
    folder: Path,
    mode: str | None,
    what: str = "hft",
    batch: int = BATCH // 2,
    resume: str | None = None,
    checkpointing: bool = False,
    callbacks: Sequence[Any] = (),
) -> list[float]:
    """`SFTTrainer(peft_config=…)`, whose checkpoint and adapter go to `folder`; the losses it logged.

    Args:
        folder: Where to.
        mode: "ddp", "fsdp2", or None in one process.
        what: "hft", a kind of `GivenConfig`, or "everything" without an adapter.
        batch: Rows in a batch of one process.
        resume: A checkpoint to go on from, relative to `folder`.
        checkpointing: Compute activations again in the backward.
        callbacks: Of the trainer.
    """
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    from peft_isolate import HalfFTConfig
    from tests.given import GivenConfig
    from tests.models import tiny
    from tests.texts import sft_rows, tokenizer

    disable_progress_bars()
    reset()
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=batch, learning_rate=5e-3,
        weight_decay=0.1, max_length=48, logging_steps=1, save_strategy="steps", save_steps=2, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=checkpointing, max_grad_norm=0.3, disable_tqdm=True,
    )  # fmt: skip
    configs = {"hft": HalfFTConfig(), "everything": None}
    trainer = SFTTrainer(
        model=tiny(),
        args=arguments,
        train_dataset=Dataset.from_list(sft_rows(16)),
        processing_class=tokenizer(),
        peft_config=configs[what] if what in configs else GivenConfig(kind=what),
        callbacks=list(callbacks),
    )
    if mode == "fsdp2":
        turn_to_fsdp(trainer.accelerator.state, fsdp2_plugin())
        trainer.is_fsdp_enabled = True
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def isolated(folder: Path, base: str, tasks: dict, options: dict, again: bool = False):
    """A whole run of CPI-FT: its result.

    Args:
        folder: Where to.
        base: Folder of the base.
        tasks, options: Of `IsolationRun`.
        again: Go on in the first job's folder.
    """
    from datasets import disable_progress_bars

    from peft_isolate.methods.core_isolation.run import IsolationRun

    disable_progress_bars()
    reset()
    return IsolationRun(base, tasks, (folder.parent / "0" if again else folder) / "out", **options).run()


if __name__ == "__main__":
    # Under its importable name, by which its exceptions and functions are found again.
    from tests.training import distributed_worker

    distributed_worker.main(Path(sys.argv[1]), vars(distributed_worker))
