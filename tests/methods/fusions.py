"""Models to be fused, and the slow, obvious twin of `fuse`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel

from peft_isolate.checkpoints.difference import difference_of
from peft_isolate.deltas.adapters import regions_of
from peft_isolate.methods.core_isolation import scope
from peft_isolate.regions import Region, base_parameters
from peft_isolate.regions.top import top
from tests.checkpoints.folders import load, saved
from tests.learn import dense
from tests.models import tiny

Tensors = dict[str, torch.Tensor]

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
ULP = torch.finfo(torch.float32).eps


def moved(base: torch.nn.Module, seed: int, size: float = 1e-2) -> torch.nn.Module:
    """The model after a training that moved everything, by amounts of many magnitudes. Changed in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in base_parameters(base).values():
            draws = torch.randn(2, *parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((draws[0] * draws[1].exp() * size).to(parameter.dtype))
    return base


def probe(folder: Path, seed: int, architecture: str = "llama", dtype=torch.float32, size: float = 1e-2, **config):
    """The folder of such a model."""
    moved(tiny(architecture, dtype, **config), seed, size).save_pretrained(folder)
    return folder


def core(base: Path, tuned: Path, percent: float = 10.0, include_embeddings: bool = False) -> Region:
    """What moved most in scope."""
    delta = difference_of(base, tuned)
    return top(delta.pairs(scope(delta.base.model, include_embeddings)), percent).region


def numbers(folder: Path, architecture: str = "llama") -> Tensors:
    """{parameter: its numbers} of a folder, tied ones once."""
    return {name: p.detach() for name, p in base_parameters(load(folder, architecture)).items()}


def slow_fuse(
    base: Tensors,
    tuned: Mapping[str, Tensors],
    regions: Mapping[str, Region],
    names: Sequence[str],
    omegas: Sequence[float],
    *,
    onto: Tensors | None = None,
    elsewhere: str = "slerp",
    slerp_on: str = "weights",
    epsilon: float = 5e-4,
) -> tuple[Tensors, dict[str, int], dict[str, int], int, dict[str, int]]:
    """As papers.md says it, scalar by scalar, all in memory, in float64.

    Args:
        base, tuned, onto: {parameter: numbers}.
        names: The parameters in scope.

    Returns:
        (θ − W0, scalars transplanted, scalars won, conflicts, {"slerp", "linear", "keep"}).
    """
    claims = {
        task: {(name, at) for name, places in region.items() for at in places.positions().tolist()}
        for task, region in regions.items()
    }
    flat = {
        task: {name: tensor.double().reshape(-1) - base[name].double().reshape(-1) for name, tensor in model.items()}
        for task, model in tuned.items()
    }
    mean = {
        task: math.fsum(abs(float(flat[task][name][at])) for name, at in claimed) / len(claimed)
        for task, claimed in claims.items()
    }
    owner: dict[tuple[str, int], str] = {}
    for task, claimed in claims.items():
        for name, at in claimed:
            other = owner.get((name, at))
            mine = abs(float(flat[task][name][at])) / mean[task]
            if other is None or mine > abs(float(flat[other][name][at])) / mean[other]:
                owner[name, at] = task
    contested = {scalar for scalar in owner if sum(scalar in claimed for claimed in claims.values()) > 1}

    kinds = {"slerp": 0, "linear": 0, "keep": 0}
    result = {}
    for name, w0 in base.items():
        start = w0 if onto is None else onto[name]
        theta = start.double().reshape(-1).clone()
        if name in names:
            free = torch.tensor([(name, at) not in owner for at in range(w0.numel())])
            origin = w0.double().reshape(-1)[free]
            for task, omega in zip(tuned, omegas, strict=True):
                if elsewhere == "keep" or not omega or not free.any():
                    kinds["keep"] += 1
                    continue
                shift = torch.zeros_like(origin) if slerp_on == "weights" else origin
                a, b = theta[free] - shift, origin + flat[task][name][free] - shift
                length = a.norm() * b.norm()
                cosine = float(a @ b / length) if length else 1.0
                if elsewhere == "linear" or abs(cosine) > 1 - epsilon:
                    kinds["linear"] += 1
                    theta[free] = (1 - omega) * a + omega * b + shift
                else:
                    kinds["slerp"] += 1
                    angle = math.acos(cosine)
                    first, second = (math.sin(share * angle) / math.sin(angle) for share in (1 - omega, omega))
                    theta[free] = first * a + second * b + shift
            for (of, at), task in owner.items():
                if of == name:
                    theta[at] = w0.double().reshape(-1)[at] + flat[task][name][at]
        result[name] = (theta - w0.double().reshape(-1)).reshape(w0.shape)
    transplanted = {task: sum(each == task for each in owner.values()) for task in tuned}
    won = {task: sum(owner[scalar] == task for scalar in contested) for task in tuned}
    return result, transplanted, won, len(contested), kinds


def made(folder: Path) -> Path:
    """A folder with base, a, b, c and onto (tuned from it), and the cores of 10 %, a.region and so on."""
    saved(folder / "base")
    for seed, name in enumerate(("a", "b", "c", "onto"), 1):
        # b moved ten times as far: who wins a conflict must not depend on that.
        probe(folder / name, seed, size=1e-1 if name == "b" else 1e-2)
        core(folder / "base", folder / name).save(folder / f"{name}.region")
    return folder


def of(folder: Path, tasks: str = "ab") -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """(base, tuned, regions) of some of its tasks."""
    return (
        folder / "base",
        {task: folder / task for task in tasks},
        {task: folder / f"{task}.region" for task in tasks},
    )


def deltas(base: Path, adapter: Path, architecture: str = "llama") -> dict[str, torch.Tensor]:
    """{parameter: its delta} of a saved adapter."""
    return dense(PeftModel.from_pretrained(load(base, architecture), adapter))


def held(adapter: Path, base: Path) -> Region:
    """Where a saved adapter, which trains nothing, has numbers."""
    learned, held = regions_of(PeftModel.from_pretrained(load(base), adapter), "default")
    assert not learned
    return held
