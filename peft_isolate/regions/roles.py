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

from .region import base_module, unwrap, walk_parameters
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

# Fused weights, told by their own name and that of the output projection: CodeGen and MiniMax have a "qkv_proj" too,
# beside an "out_proj", in an order of their own. "blocks": q, k and v one after the other (Phi-3, GPT-2); "heads": q,
# k and v of one head, then of the next (GPT-NeoX, BLOOM).
FUSED_ATTENTION = {
    ("qkv_proj", "o_proj"): "blocks",
    ("c_attn", "c_proj"): "blocks",
    ("query_key_value", "dense"): "heads",
}
FUSED_ATTENTION_NAMES = {fused for fused, _ in FUSED_ATTENTION}
FUSED_FEED_FORWARD = "gate_up_proj"


@dataclass(frozen=True)
class Role:
    """What one parameter, or one block of a fused one, is.

    Attributes:
        parameter: Its name, as in `model.named_parameters()` of the base model.
        name: "q", "k", "v", "o", "gate", "up", "down", "norm", "router", "embedding", "head" or "unknown". A bias has
            its matrix's.
        selection: The block: everything, or some output units of a fused weight (rows; columns of a `Conv1D`; entries
            of a bias, which is one row).
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
    embeddings = {id(base_module(module)) for module in _ask(model, "get_input_embeddings")}
    heads = {id(base_module(module)) for module in _ask(model, "get_output_embeddings")}
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
        elif leaf in FUSED_ATTENTION_NAMES:
            blocks = _fused_attention(module, shape, leaf, modules, parent, n_heads)
        elif leaf == FUSED_FEED_FORWARD:
            blocks = _fused_feed_forward(module, shape)
        elif _is_attention(parent, modules):
            blocks = [(ATTENTION_NAMES.get(leaf, "unknown"), whole)]
        else:
            blocks = [(FEED_FORWARD_NAMES.get(leaf, "unknown") if layer is not None else "unknown", whole)]
        found += [Role(parameter_name, role, selection, name, stack, layer) for role, selection in blocks]
    return found


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{name before wrapping: base module}: adapters' own modules are left out."""

    def visit(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = base_module(module)
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
    return {"q", "k", "v"} <= apart or bool(children & FUSED_ATTENTION_NAMES)


def _width(module: nn.Module, side: Literal["input", "output"]) -> int | None:
    """Input or output units of a linear module; None where it has no matrix named weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return None
    return weight.shape[0 if (side == "input") == isinstance(module, Conv1D) else 1]


def _by_columns(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether output units are columns: of a `Conv1D`'s weight, and of a bias, which is one row."""
    return len(shape) == 1 or isinstance(module, Conv1D)


def _has_units(module: nn.Module, shape: tuple[int, ...], total: int | None) -> bool:
    """Whether a parameter has one entry or row for each output unit; scales of a quantised weight do not."""
    return total is not None and len(shape) in (1, 2) and shape[-1 if _by_columns(module, shape) else 0] == total


def _units(
    module: nn.Module, shape: tuple[int, ...], start: int, length: int, step: int = 0, count: int = 1
) -> Selection:
    """The block of output units as a selection of a weight (its output axis) or of a bias."""
    indices = strided(start, length, step, count)
    return (Selection.columns if _by_columns(module, shape) else Selection.rows)(shape, indices)


def _fused_feed_forward(module: nn.Module, shape: tuple[int, ...]) -> list[tuple[RoleName, Selection]]:
    """gate, then up, of a fused weight."""
    total = _width(module, "output")
    if total is None or total % 2 or not _has_units(module, shape, total):
        return [("unknown", Selection.whole(shape))]
    half = total // 2
    return [("gate", _units(module, shape, 0, half)), ("up", _units(module, shape, half, half))]


def _fused_attention(
    module: nn.Module,
    shape: tuple[int, ...],
    leaf: str,
    modules: dict[str, nn.Module],
    parent: str,
    n_heads: int | None,
) -> list[tuple[RoleName, Selection]]:
    """q, k and v of a fused weight. The output projection reads what the heads wrote, so its width is that of q."""
    unknown: list[tuple[RoleName, Selection]] = [("unknown", Selection.whole(shape))]
    outputs = [(n, child) for n, child in modules[parent].named_children() if ATTENTION_NAMES.get(n) == "o"]
    if len(outputs) != 1:
        return unknown
    layout = FUSED_ATTENTION.get((leaf, outputs[0][0]))
    total, width_q = _width(module, "output"), _width(base_module(outputs[0][1]), "input")
    if layout is None or total is None or width_q is None or not _has_units(module, shape, total):
        return unknown
    width_kv = (total - width_q) // 2
    if width_kv <= 0 or width_q + 2 * width_kv != total:
        return unknown
    if layout == "blocks":
        # GPT-BigCode's c_attn is a Linear: in blocks where heads share k and v, head by head where they do not.
        if leaf == "c_attn" and not isinstance(module, Conv1D) and width_q == width_kv:
            return unknown
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
