"""Where a model can be gated: the output units of up and down, and the heads of every attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ....errors import IsolateError, RegionError
from ....regions.fused import is_transposed, n_fused_experts, width
from ....regions.region import device_of, is_plain, logical_shape, unwrap
from ....regions.roles import Role, roles
from ....regions.selection import Selection
from ....regions.tree import Tree

KINDS = ("up", "down", "heads")
ATTENTIONS = ("attention", "cross-attention")
FEED_FORWARDS = ("feed-forward", "expert", "shared-expert")
# Where an attention says how many query heads it has; most leave it to the config.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
# Tokens whose products are held in fp32 at once.
_TOKENS = 1024

# (gradient of a tensor, the tensor itself) -> gradient of the gates on it
Reduce = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def key_of(role: Role) -> str | None:
    """Under which key the importance of a role's output units stands, see `Importance.key_of`."""
    if role.layer is None or role.tower:
        return None
    kind = ""
    if role.block in FEED_FORWARDS and role.name in ("up", "down"):
        kind = role.name
    elif role.block in ATTENTIONS and role.name in ("q", "k", "v"):
        kind = "heads"
    return f"{role.stack}.{role.layer}.{role.block}.{kind}" if kind else None


@dataclass(eq=False)
class Site:
    """The gates at one place of the model.

    Attributes:
        key: See `key_of`.
        module: Name of the module they are put on.
        reduce: How the gradient of a tensor becomes the gates'; the key is the name of a parameter of fused experts,
            and "" for the module's output, or its input if it is an attention's output projection.
        expert: Which expert of a list this is; None where one module holds all of them, and outside experts.
        gate: The gates themselves, all 1: (n_units,), or (n_experts, n_units) of fused experts; fp32 (fp64 for fp64).
        calls: How often the module was called.
    """

    key: str
    module: str
    reduce: dict[str, Reduce]
    expert: int | None
    gate: torch.Tensor
    calls: int = 0

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.key.rpartition(".")[2]

    @property
    def is_fused(self) -> bool:
        """Whether the gates are on parameters that hold all experts."""
        return "" not in self.reduce


def find_sites(model: nn.Module, heads: bool) -> list[Site]:
    """Every place of a model that can be gated, in the model's order.

    Args:
        model: Any model; adapters that already wrap it are looked through.
        heads: Gate attention heads, too. One warning names those that have no place for a gate.

    Raises:
        RegionError: There is none.
        IsolateError: Fused experts are quantised, sharded or offloaded.
    """
    finder = _Finder(model)
    sites = list(finder.find(heads))
    if not sites:
        raise RegionError(
            f"{type(unwrap(model)).__name__} has no up or down projection in its layers that was recognised"
            f"{', and no attention head to gate' if heads else ', and heads=False'}, so there is no importance to "
            "measure: train it without (importance=None)"
        )
    warn_without(finder.without, stacklevel=5)
    return sites


def unit_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{key: shape of its importance}, for every place of a model that can be gated."""
    shapes: dict[str, tuple[int, ...]] = {}
    for site in _Finder(model, gated=False).find(heads=True):
        own = tuple(site.gate.shape)
        count = shapes[site.key][0] + 1 if site.key in shapes else 1
        shapes[site.key] = own if site.expert is None else (count, *own)
    return shapes


def warn_without(without: dict[str, list[str]], stacklevel: int) -> None:
    """Say in one warning what is not measured.

    Args:
        without: {reason: keys}.
        stacklevel: Of the warning, from here.
    """
    said = []
    for why, keys in without.items():
        layers: dict[str, list[str]] = {}
        for key in dict.fromkeys(keys):
            stack, layer, block, kind = key.rsplit(".", 3)
            layers.setdefault(f"the {kind} of {stack}, {block}, layers", []).append(layer)
        if keys:
            said.append(", ".join(f"{what} {', '.join(of)}" for what, of in layers.items()) + f" ({why})")
    if said:
        warnings.warn(
            f"there is no hook point for {'; '.join(said)}: their importance is not measured, and they train unmasked",
            stacklevel=stacklevel,
        )


class _Finder:
    """Makes the sites of one model, or with `gated=False` only their shapes; `without` collects what has none, as
    {reason: keys}.
    """

    def __init__(self, model: nn.Module, gated: bool = True) -> None:
        self.gated = gated
        self.tree = Tree(model)
        self.every = roles(model)
        self.without: dict[str, list[str]] = {}

    def find(self, heads: bool) -> Iterator[Site]:
        of_key: dict[str, list[Site]] = {}
        attentions: dict[str, list[Role]] = {}
        inside = [role for role in self.every if not role.tower and role.layer is not None]
        for role in inside:
            if heads and role.block in ATTENTIONS:
                attentions.setdefault(f"{role.stack}.{role.layer}.{role.block}.heads", []).append(role)
        for role in inside:
            key = f"{role.stack}.{role.layer}.attention.heads"
            unknown = role.name == "unknown" and len(role.selection.shape) > 1 and "att" in role.module.lower()
            if heads and unknown and key not in attentions:  # DeepSeek's latent attention
                self._cannot("its projections are not recognised", key)
        for role in self.every:
            heads_key = f"{role.stack}.{role.layer}.{role.block}.heads"
            if (site := self._of_heads(heads_key, attentions.pop(heads_key, None)) or self._of_role(role)) is not None:
                of_key.setdefault(site.key, []).append(site)
        for key, sites in of_key.items():
            numbers, shapes = [site.expert for site in sites], {site.gate.shape for site in sites}
            if len(shapes) == 1 and numbers in ([None], list(range(len(sites)))):
                yield from sites
            else:
                self._cannot("more than one module of the layer has this role", key)

    def _of_role(self, role: Role) -> Site | None:
        key, own = key_of(role), role.parameter.rpartition(".")[2]
        if key is None or role.name not in ("up", "down"):
            return None
        if n_fused_experts(self.tree.modules[role.module]):
            # The first expert's rows say which rows of every expert they are; a bias comes with its matrix.
            return self._of_experts(key, role, own) if role.expert == 0 and not own.endswith("_bias") else None
        if own != "weight":
            return None
        units = _units(role.selection)
        n_units = width(self.tree.modules[role.module], "output") if units is None else len(units)
        return self._site(key, role, (n_units or 0,), {"": partial(of_columns, units=units)}, role.expert)

    def _of_experts(self, key: str, role: Role, own: str) -> Site:
        module = self.tree.modules[role.module]
        parameter = module.get_parameter(own)
        if self.gated and not is_plain(parameter, module):
            raise IsolateError(
                f"{role.parameter} is quantised, sharded or offloaded, and gates on fused experts need its numbers: "
                "measure the importance on the model in its own dtype on one device"
            )
        transposed, shape = is_transposed(module), logical_shape(module, own, parameter)
        units = None if transposed else _units(role.selection)
        n_units = shape[2 if transposed else 1] if units is None else len(units)
        reduce: dict[str, Reduce] = {own: partial(of_each_expert, axis=0 if transposed else 1, units=units)}
        if module._parameters.get(f"{own}_bias") is not None:
            reduce[f"{own}_bias"] = partial(of_each_expert, axis=None, units=units)
        return self._site(key, role, (shape[0], n_units), reduce, None)

    def _of_heads(self, key: str, attention: list[Role] | None) -> Site | None:
        """On the input of the output projection, which is what the heads wrote, one after the other."""
        if attention is None:
            return None
        q, o = ([r for r in attention if r.name == name and r.parameter.endswith(".weight")] for name in ("q", "o"))
        if len(q) != 1 or len(o) != 1:
            return self._cannot("the query and the output projection are not both recognised", key)
        units = _units(q[0].selection)
        n_q = width(self.tree.modules[q[0].module], "output") if units is None else len(units)
        n_o = width(self.tree.modules[o[0].module], "input")
        if n_q is None or n_q != n_o:
            return self._cannot(f"the query has {n_q} units, and the output projection reads {n_o}", key)
        holder = self.tree.modules[q[0].module.rpartition(".")[0]]
        counts = [getattr(holder, name, None) for name in HEAD_COUNTS]
        counts.append(getattr(self.tree.config, "num_attention_heads", None))
        n_heads = next((n for n in counts if isinstance(n, int) and n > 0), None)
        if n_heads is None or n_o % n_heads:
            return self._cannot(f"{n_heads} heads do not divide {n_o} units", key)
        return self._site(key, o[0], (n_heads,), {"": partial(of_heads, n_heads=n_heads)}, None)

    def _site(
        self, key: str, role: Role, shape: tuple[int, ...], reduce: dict[str, Reduce], expert: int | None
    ) -> Site:
        module = self.tree.modules[role.module]
        parameter = module.get_parameter(role.parameter.rpartition(".")[2])
        device = device_of(parameter, module) if self.gated else "meta"
        gate = torch.ones(shape, dtype=wide(parameter.dtype), device=device, requires_grad=True)
        return Site(key, role.module, reduce, expert, gate)

    def _cannot(self, why: str, key: str) -> Site | None:
        self.without.setdefault(why, []).append(key)
        return None


def _units(selection: Selection) -> torch.Tensor | None:
    """Numbers of the output units that a block of a matrix is; None for all of them."""
    return None if selection.kind == "whole" else selection.indices


def wide(dtype: torch.dtype) -> torch.dtype:
    """What gradients of gates are summed in: fp32, or fp64 where the model computes in it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def of_columns(gradient: torch.Tensor, x: torch.Tensor, units: torch.Tensor | None = None) -> torch.Tensor:
    """Σ gradient · x over all tokens: (…, n) and (…, n) in any float dtype -> (n,), or (len(units),), in fp32."""
    total = torch.zeros(x.shape[-1], dtype=wide(x.dtype), device=x.device)
    parts = (tensor.reshape(-1, x.shape[-1]).split(_TOKENS) for tensor in (gradient, x))
    for left, right in zip(*parts, strict=True):
        total += (left.to(total.dtype) * right.to(total.dtype)).sum(0)
    return total if units is None else total[units.to(total.device)]


def of_heads(gradient: torch.Tensor, x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """As `of_columns`, summed over the units of each head: (…, n_heads · width) -> (n_heads,)."""
    return of_columns(gradient, x).reshape(n_heads, -1).sum(1)


def of_each_expert(
    gradient: torch.Tensor, w: torch.Tensor, axis: int | None, units: torch.Tensor | None = None
) -> torch.Tensor:
    """Σ gradient · w over an expert's input units: (n_experts, …) -> (n_experts, n_units) in fp32.

    Args:
        gradient: Of `w`.
        w: All experts' matrices, or their biases.
        axis: The input units of one expert's matrix; None for biases.
        units: Which output units; None for all.
    """
    rows = []
    for left, right in zip(gradient, w, strict=True):  # one by one: in fp32 all of them may be gigabytes
        product = left.to(wide(w.dtype)) * right.to(wide(w.dtype))
        row = product if axis is None else product.sum(axis)
        rows.append(row if units is None else row[units.to(row.device)])
    return torch.stack(rows)


def number(n: int, what: str, plural: str = "s") -> str:
    """So many of something, in words: "1 batch", "1,024 tokens"."""
    return f"{n:,} {what}{'' if n == 1 else plural}"
