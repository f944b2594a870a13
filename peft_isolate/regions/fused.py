"""The blocks of fused weights: which output units of one tensor are q, k, v, gate, up or an expert's.

Sizes decide. Where they do not add up to a layout that is known for certain, the tensor is "unknown" as a whole.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from .region import logical_shape
from .selection import Selection, strided

RoleName = Literal[
    "q", "k", "v", "o", "gate", "up", "down", "mixer", "state", "norm", "router", "embedding", "head", "unknown",
]  # fmt: skip

# Fused weights, told by their own name and that of the output projection: CodeGen and MiniMax have a "qkv_proj" too,
# beside an "out_proj", in an order of their own. "blocks": q, k and v one after the other (Phi-3, GPT-2, MPT);
# "heads": q, k and v of one head, then of the next (GPT-NeoX, BLOOM, Falcon).
FUSED_ATTENTION = {
    ("qkv_proj", "o_proj"): "blocks",
    ("c_attn", "c_proj"): "blocks",
    ("Wqkv", "out_proj"): "blocks",
    ("Wqkv", "Wo"): "blocks",
    ("query_key_value", "dense"): "heads",
}
FUSED_ATTENTION_NAMES = {fused for fused, _ in FUSED_ATTENTION}
FUSED_FEED_FORWARD = "gate_up_proj"
EXPERT_PARAMETERS: dict[str, RoleName] = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


class Block(NamedTuple):
    """Some output units of one parameter.

    Attributes:
        role: What they are.
        selection: Which they are.
        expert: Whose they are, in a tensor that holds every expert's.
    """

    role: RoleName
    selection: Selection
    expert: int | None = None


def width(module: nn.Module, side: Literal["input", "output"]) -> int | None:
    """Input or output units of a linear module; None where it has no matrix named weight."""
    weight = getattr(module, "weight", None)
    shape = logical_shape(module, "weight", weight) if isinstance(weight, nn.Parameter) else ()
    if len(shape) != 2:
        return None
    return shape[0 if (side == "input") == isinstance(module, Conv1D) else 1]


def fused_feed_forward(module: nn.Module, shape: tuple[int, ...]) -> list[Block]:
    """gate, then up, of a fused weight."""
    total = width(module, "output")
    if total is None or total % 2 or not _has_units(module, shape, total):
        return [Block("unknown", Selection.whole(shape))]
    half = total // 2
    return [Block("gate", _units(module, shape, 0, half)), Block("up", _units(module, shape, half, half))]


def fused_attention(
    module: nn.Module, shape: tuple[int, ...], leaf: str, outputs: list[tuple[str, nn.Module]], config: Any
) -> list[Block]:
    """q, k and v of a fused weight. The output projection reads what the heads wrote, so its width is that of q.

    Args:
        module: That holds the weight.
        shape: Of the weight, or of its bias.
        leaf: The module's name in the attention.
        outputs: The attention's output projections, each with its name there; there should be one.
        config: Of the model, or None: it has the number of heads.
    """
    unknown = [Block("unknown", Selection.whole(shape))]
    if len(outputs) != 1:
        return unknown
    layout = FUSED_ATTENTION.get((leaf, outputs[0][0]))
    total, width_q = width(module, "output"), width(outputs[0][1], "input")
    if layout is None or total is None or width_q is None or not _has_units(module, shape, total):
        return unknown
    width_kv = (total - width_q) // 2
    if width_kv <= 0 or width_q + 2 * width_kv != total:
        return unknown
    n_groups, q, kv = 1, width_q, width_kv
    if layout == "blocks":
        # GPT-BigCode's c_attn is a Linear: in blocks where heads share k and v, head by head where they do not.
        if leaf == "c_attn" and not isinstance(module, Conv1D) and width_q == width_kv:
            return unknown
    else:
        n_heads = getattr(config, "num_attention_heads", None)
        if not n_heads or width_q % n_heads or width_kv % (width_q // n_heads):
            return unknown
        # Where heads share k and v, Falcon goes by groups: the q of those heads, their k, their v. ChatGLM, under the
        # same names, does not.
        if width_q != width_kv and not hasattr(config, "new_decoder_architecture"):
            return unknown
        kv = width_q // n_heads
        n_groups = width_kv // kv
        q = width_q // n_groups
    step = q + 2 * kv
    return [
        Block("q", _units(module, shape, 0, q, step, n_groups)),
        Block("k", _units(module, shape, q, kv, step, n_groups)),
        Block("v", _units(module, shape, q + kv, kv, step, n_groups)),
    ]


def n_fused_experts(module: nn.Module) -> int:
    """Experts whose matrices a module itself holds in 3-D tensors, (experts, …, …); 0 where it holds none."""
    found = {name: logical_shape(module, name, p) for name, p in module._parameters.items() if p is not None}
    down = found.get("down_proj", ())
    first = found.get(FUSED_FEED_FORWARD, found.get("up_proj", ()))
    return down[0] if len(down) == len(first) == 3 and down[0] == first[0] else 0


def is_transposed(module: nn.Module) -> bool:
    """Whether output units of fused experts are columns, as in gpt-oss and Llama 4. Some say so; shapes tell too."""
    first, down = module._parameters.get(FUSED_FEED_FORWARD), module.get_parameter("down_proj")
    by_shape = first is not None and first.shape[1] == down.shape[2] and first.shape[2] == 2 * down.shape[1]
    return by_shape or bool(getattr(module, "is_transposed", False))


def fused_experts(module: nn.Module, name: str, shape: tuple[int, ...]) -> list[Block]:
    """The blocks of every expert in one tensor of a module that `n_fused_experts` knows.

    Rows are all leading dimensions flattened, so that an expert's matrix is a run of rows. In gpt-oss and Llama 4 the
    matrices are transposed, and gate and up would be single elements: their tensor is "unknown", as is a bias of gate
    and up.

    Args:
        module: That holds the tensors.
        name: The tensor's, in the module.
        shape: (experts, rows, columns), or (experts, units) of a bias.
    """
    n_experts = n_fused_experts(module)
    role = EXPERT_PARAMETERS.get(name.removesuffix("_bias"))
    if shape[0] == n_experts and role and len(shape) == (2 if name.endswith("_bias") else 3):
        n_rows = 1 if len(shape) == 2 else shape[1]
        return [Block(role, s, e) for e, s in enumerate(_of_each_expert(shape, n_rows, 0, n_rows, n_rows))]
    down = logical_shape(module, "down_proj", module.get_parameter("down_proj"))
    by_rows = len(shape) == 3 and shape[0] == n_experts and shape[1] == 2 * down[2] and shape[2] == down[1]
    # transformers says whether gate and up are halves, or alternate row by row.
    halves = getattr(module, "is_concatenated", None)
    if name != FUSED_FEED_FORWARD or not by_rows or not isinstance(halves, bool):
        return [Block("unknown", Selection.whole(shape))]
    n_rows, half = shape[1], shape[1] // 2
    gates, ups = (
        _of_each_expert(shape, n_rows, part * half, half, half)
        if halves
        else _of_each_expert(shape, n_rows, part, 1, 2)
        for part in (0, 1)
    )
    return [
        block
        for expert, (gate, up) in enumerate(zip(gates, ups, strict=True))
        for block in (Block("gate", gate, expert), Block("up", up, expert))
    ]


@lru_cache(maxsize=64)  # every layer has the same blocks
def _of_each_expert(shape: tuple[int, ...], n_rows: int, start: int, length: int, step: int) -> tuple[Selection, ...]:
    """Blocks of `length` rows, every `step` rows, from row `start` of an expert's `n_rows` up to its last."""
    count = (n_rows - start - length) // step + 1 if step > length else 1
    return tuple(
        Selection.rows(shape, strided(expert * n_rows + start, length, step, count)) for expert in range(shape[0])
    )


def by_columns(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether output units are columns: of a `Conv1D`'s weight, and of a bias, which is one row."""
    return len(shape) == 1 or isinstance(module, Conv1D)


def _has_units(module: nn.Module, shape: tuple[int, ...], total: int | None) -> bool:
    """Whether a parameter has one entry or row for each output unit; scales of a quantised weight do not."""
    return total is not None and len(shape) in (1, 2) and shape[-1 if by_columns(module, shape) else 0] == total


def _units(
    module: nn.Module, shape: tuple[int, ...], start: int, length: int, step: int = 0, count: int = 1
) -> Selection:
    """The block of output units as a selection of a weight (its output axis) or of a bias."""
    indices = strided(start, length, step, count)
    return (Selection.columns if by_columns(module, shape) else Selection.rows)(shape, indices)
