"""The role of every parameter of a model: what it is and where it stands, on any architecture.

Structure decides first, names second. The layer of a parameter is its place in the outermost `nn.ModuleList`; a module
with only vectors is a norm; the embeddings and the head are what the model itself says they are; an attention is what
holds q, k and v, and the sizes of a fused weight's blocks follow from the width of the attention's output. Only then
does a name tell q from k, and gate from up. What is not recognised has the role "unknown", never a guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from .region import unwrap, walk_parameters
from .selection import Selection, strided

RoleName = Literal["q", "k", "v", "o", "gate", "up", "down", "norm", "router", "embedding", "head", "unknown"]
ROLES: tuple[RoleName, ...] = (
    "q", "k", "v", "o", "gate", "up", "down", "norm", "router", "embedding", "head", "unknown",
)  # fmt: skip

ATTENTION_NAMES: dict[str, RoleName] = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o",
    "query": "q", "key": "k", "value": "v", "c_proj": "o", "dense": "o",
}  # fmt: skip
FEED_FORWARD_NAMES: dict[str, RoleName] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "fc1": "up", "fc2": "down", "c_fc": "up", "c_proj": "down",
    "dense_h_to_4h": "up", "dense_4h_to_h": "down",
}  # fmt: skip
HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier")

# Fused weights. "blocks": q, k and v one after the other; "heads": q, k and v of one head, then of the next.
FUSED_ATTENTION = {"qkv_proj": "blocks", "c_attn": "blocks", "query_key_value": "heads"}
FUSED_FEED_FORWARD = "gate_up_proj"


@dataclass(frozen=True)
class Role:
    """What one parameter, or one block of a fused one, is.

    Attributes:
        parameter: Its name, as in `model.named_parameters()` of the base model.
        name: "q", "k", "v", "o", "gate", "up", "down", "norm", "router", "embedding", "head" or "unknown". A bias has
            its matrix's.
        selection: The block: everything, or some output units of a fused weight (rows; columns of a `Conv1D`; entries of a
            bias, which is one row).
        module: Name of the module that holds the parameter.
        stack: Name of the `nn.ModuleList` the parameter's layer stands in; "" outside the layers.
        layer: Its place there, from 0; None outside the layers.
    """

    parameter: str
    name: RoleName
    selection: Selection
    module: str
    stack: str
    layer: int | None


def roles(model: nn.Module) -> list[Role]:
    """The role of every parameter of the base model, in the model's own order, tied tensors once.

    Args:
        model: Any module; adapters that already wrap it are looked through.

    Returns:
        One entry a parameter, or one for each block of a fused weight.

    Example:
        >>> import torch
        >>> [role.name for role in roles(torch.nn.Linear(2, 2))]
        ['unknown', 'unknown']
    """
    model = unwrap(model)
    modules = _base_modules(model)
    embeddings = {id(_base_layer(module)) for module in _ask(model, "get_input_embeddings")}
    heads = {id(_base_layer(module)) for module in _ask(model, "get_output_embeddings")}
    n_heads = _attention_heads(model)

    found = []
    for parameter_name, name, module, parameter in walk_parameters(model):
        stack, layer = _place(name, modules)
        shape = tuple(parameter.shape)
        parent, _, leaf = name.rpartition(".")
        whole = Selection.whole(shape)
        if id(module) in embeddings or isinstance(module, nn.Embedding):
            blocks: list[tuple[RoleName, Selection]] = [("embedding", whole)]
        elif id(module) in heads or (layer is None and leaf in HEAD_NAMES):
            blocks = [("head", whole)]
        elif all(tensor.ndim <= 1 for tensor in module.parameters()):
            blocks = [("norm" if _is_norm(module) else "unknown", whole)]
        elif leaf in FUSED_ATTENTION:
            blocks = _fused_attention(module, shape, FUSED_ATTENTION[leaf], modules, parent, n_heads)
        elif leaf == FUSED_FEED_FORWARD:
            half = _output_units(module) // 2
            blocks = [("gate", _units(module, shape, 0, half)), ("up", _units(module, shape, half, half))]
        elif _is_attention(parent, modules):
            blocks = [(ATTENTION_NAMES.get(leaf, "unknown"), whole)]
        else:
            blocks = [(FEED_FORWARD_NAMES.get(leaf, "unknown") if layer is not None else "unknown", whole)]
        found += [Role(parameter_name, role, selection, name, stack, layer) for role, selection in blocks]
    return found


def _base_layer(module: nn.Module) -> nn.Module:
    while isinstance(inner := module._modules.get("base_layer"), nn.Module):
        module = inner
    return module


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{name before wrapping: base module}: adapters' own modules are left out."""

    def visit(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = _base_layer(module)
        yield name, module
        for child_name, child in module.named_children():
            yield from visit(child, f"{name}.{child_name}" if name else child_name)

    return dict(visit(model, ""))


def _ask(model: nn.Module, getter: str) -> list[nn.Module]:
    """What a transformers model answers, or nothing: some raise where they have no such module."""
    try:
        answer = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return []
    return [answer] if isinstance(answer, nn.Module) else []


def _attention_heads(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "num_attention_heads", None)


def _place(name: str, modules: dict[str, nn.Module]) -> tuple[str, int | None]:
    """(name of the outermost module list on the way, index in it): experts in a layer do not count as layers."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        stack = ".".join(parts[:depth])
        if isinstance(modules.get(stack), nn.ModuleList) and parts[depth].isdigit():
            return stack, int(parts[depth])
    return "", None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _is_attention(name: str, modules: dict[str, nn.Module]) -> bool:
    """An attention holds q, k and v, apart or fused."""
    children = {child for child, _ in modules[name].named_children()} if name in modules else set()
    apart = {ATTENTION_NAMES.get(child) for child in children}
    return {"q", "k", "v"} <= apart or bool(children & FUSED_ATTENTION.keys())


def _output_units(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight.shape[-1] if isinstance(module, Conv1D) else weight.shape[0]


def _input_units(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight.shape[0] if isinstance(module, Conv1D) else weight.shape[-1]


def _units(module: nn.Module, shape: tuple[int, ...], start: int, length: int, step: int = 0, count: int = 1):
    """The block of output units as a selection of a weight (its output axis) or of a bias (a vector is one row)."""
    indices = strided(start, length, step, count)
    if len(shape) == 1 or isinstance(module, Conv1D):
        return Selection.columns(shape, indices)
    return Selection.rows(shape, indices)


def _fused_attention(
    module: nn.Module,
    shape: tuple[int, ...],
    layout: str,
    modules: dict[str, nn.Module],
    parent: str,
    n_heads: int | None,
) -> list[tuple[RoleName, Selection]]:
    """q, k and v of a fused weight. The output projection reads what the heads wrote, so its width is that of q."""
    total = _output_units(module)
    unknown: list[tuple[RoleName, Selection]] = [("unknown", Selection.whole(shape))]
    outputs = [child for name, child in modules[parent].named_children() if ATTENTION_NAMES.get(name) == "o"]
    if len(outputs) != 1:
        return unknown
    width_q = _input_units(_base_layer(outputs[0]))
    width_kv = (total - width_q) // 2
    if width_kv <= 0 or width_q + 2 * width_kv != total:
        return unknown
    if layout == "blocks":
        return [
            ("q", _units(module, shape, 0, width_q)),
            ("k", _units(module, shape, width_q, width_kv)),
            ("v", _units(module, shape, width_q + width_kv, width_kv)),
        ]
    if not n_heads or width_q != width_kv or width_q % n_heads:
        return unknown
    width = width_q // n_heads
    return [
        ("q", _units(module, shape, 0, width, 3 * width, n_heads)),
        ("k", _units(module, shape, width, width, 3 * width, n_heads)),
        ("v", _units(module, shape, 2 * width, width, 3 * width, n_heads)),
    ]
