"""How long does an adapter take to load and to merge, beside its peers?

On a Llama shape in fp32. Random single elements, exactly as many of each matrix as SHiRA's, about 1 %.

- `load`: `PeftModel.from_pretrained` onto a fresh base, beside a LoRA adapter of as many bytes on disk, a SHiRA
  adapter, and ours as `compress` packs it. The files are in the page cache.
- `load and forward`: the same, and the logits of 16 tokens: positions are decoded when they are first needed.
- `merge`: `merge_adapter` into the base, which is put back before each round, outside the time.
- `merge and unload`: `merge_and_unload` of a model that was loaded outside the time.

Medians of interleaved runs. `ratio` is a run's time over its peer's, `bar` what it should keep to.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import peers
import torch
from common import Bar, interleaved, report
from peft import PeftModel
from torch import nn

from peft_isolate import compress

ROUNDS = 15
OURS, PACKED, SHIRA = "1 % elements", "1 % elements, packed in bf16", "SHiRA"
# {group: {run: (peer, how many times the peer's time it may take)}}; LoRA's rank is chosen by the bytes.
LOAD = {"load": {OURS: 1.0, PACKED: None, SHIRA: None}, "load and forward": {OURS: None, PACKED: None}}
MERGE = {"merge": {OURS: 0.2}, "merge and unload": {OURS: None}}


def twin(base: nn.Module) -> nn.Module:
    """Fresh modules around the same parameters."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def filled(model: nn.Module) -> nn.Module:
    """The adapter with random numbers instead of zeros."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=1e-3)
    return model


def adapters(base: nn.Module, folder: Path) -> dict[str, Path]:
    """Save one adapter for each run that loads; {run: folder}."""
    n_bytes = saved(filled(peers.elements(twin(base))), folder / OURS)
    compress(folder / OURS, folder / PACKED, values="bf16")
    of_rank_1 = 4 * sum(sum(shape) for shape in peers.matrices(base).values())
    rank = round(n_bytes / of_rank_1)
    lora = f"LoRA r = {rank}"
    saved(filled(peers.lora(twin(base), rank)), folder / lora)
    saved(filled(peers.shira(twin(base))), folder / SHIRA)
    return {run: folder / run for run in (OURS, PACKED, SHIRA, lora)}


def saved(model: nn.Module, folder: Path) -> int:
    """Bytes of the file."""
    model.save_pretrained(folder)
    return file_bytes(folder)


def file_bytes(folder: Path) -> int:
    """Bytes of an adapter's tensors on disk."""
    return (folder / "adapter_model.safetensors").stat().st_size


def loading(base: nn.Module, folders: Mapping[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """{group: {run: median seconds}} of loading."""
    tokens = torch.randint(0, peers.VOCABULARY, (1, 16))

    def load(folder: Path) -> nn.Module:
        return PeftModel.from_pretrained(twin(base), folder)

    @torch.no_grad()
    def load_and_run(folder: Path) -> None:
        load(folder)(input_ids=tokens)

    lora = list(folders)[-1]
    seconds = {}
    for group, run in (("load", load), ("load and forward", load_and_run)):
        runs = {name: (lambda name=name, run=run: run(folders[name])) for name in [*LOAD[group], lora]}
        seconds[group] = interleaved(runs, rounds)
    return seconds


def merging(base: nn.Module, folders: Mapping[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """{group: {run: median seconds}} of merging."""
    models = {run: PeftModel.from_pretrained(copy.deepcopy(base), folders[run]) for run in (OURS, SHIRA)}

    def unmerge() -> None:
        for model in models.values():
            if next(layer for layer in model.modules() if hasattr(layer, "merged_adapters")).merged_adapters:
                model.unmerge_adapter()

    runs: dict[str, Callable[[], object]] = {run: model.merge_adapter for run, model in models.items()}
    seconds = {"merge": interleaved(runs, rounds, before=unmerge)}
    unmerge()

    def reload() -> None:
        for run in models:
            restored = models[run].unload()
            restored.load_state_dict(base.state_dict())
            models[run] = PeftModel.from_pretrained(restored, folders[run])

    unloads = {run: (lambda run=run: models[run].merge_and_unload()) for run in models}
    seconds["merge and unload"] = interleaved(unloads, min(rounds, 7), before=reload)
    return seconds


def rows_of(seconds: Mapping[str, Mapping[str, float]], folders: Mapping[str, Path]) -> Iterator[dict[str, str]]:
    """A row for each group and run."""
    for group, of_group in seconds.items():
        *_, peer = of_group
        for run, s in of_group.items():
            limit = (LOAD | MERGE)[group].get(run)
            yield {
                "what": group,
                "run": run,
                "bytes": f"{file_bytes(folders[run])}",
                "ms": f"{1e3 * s:.1f}",
                "peer": peer if run != peer else "",
                "ratio": f"{s / of_group[peer]:.3f}" if run != peer else "",
                "bar": "" if limit is None else f"{limit:.2f}",
            }


def measured(rounds: int) -> tuple[dict[str, dict[str, float]], list[dict[str, str]]]:
    """All of it: ({group: {run: seconds}}, rows)."""
    base = peers.llama()
    with tempfile.TemporaryDirectory() as folder:
        folders = adapters(base, Path(folder))
        seconds = loading(base, folders, rounds) | merging(base, folders, rounds)
        return seconds, list(rows_of(seconds, folders))


def bars() -> list[Bar]:
    """The bars of loading and of merging."""
    seconds, _ = measured(rounds=9)
    found = []
    for group, limits in (LOAD | MERGE).items():
        *_, peer = seconds[group]
        for run, limit in limits.items():
            if limit is not None:
                ratio = seconds[group][run] / seconds[group][peer]
                found.append(Bar.ratio(f"{run}, {group}, float32", peer, limit, ratio))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    report("loading", measured(args.rounds)[1])


if __name__ == "__main__":
    main()
