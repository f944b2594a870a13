"""The role of every parameter of a model: what it is and where it stands, on any architecture.

Structure decides first, names second. The layer of a parameter is its place in the outermost `nn.ModuleList`; a module
with only vectors is a norm; the embeddings and the head are what the model itself says they are; an attention is what
holds q, k and v, a feed-forward what holds up and down, a mixture of experts what holds experts, a mixer what holds a
convolution over the tokens or the numbers of a recurrence; and the sizes of a fused weight's blocks follow from the
width of the output projection. Only then does a name tell q from k, and gate from up. What is not recognised has the
role "unknown", never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from .fused import (
    FUSED_ATTENTION_NAMES,
    FUSED_FEED_FORWARD,
    Block,
    RoleName,
    fused_attention,
    fused_experts,
    fused_feed_forward,
    n_fused_experts,
    width,
)
from .region import logical_shape, shapes_of, walk_parameters
from .selection import Selection
from .tree import Tree, join

ROLES: tuple[RoleName, ...] = get_args(RoleName)
BlockName = Literal["attention", "cross-attention", "feed-forward", "expert", "shared-expert", "mixer", ""]

ATTENTION_NAMES: dict[str, RoleName] = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o",
    "query": "q", "key": "k", "value": "v", "c_proj": "o", "dense": "o",
    "q": "q", "k": "k", "v": "v", "o": "o", "Wo": "o",
    "query_proj": "q", "key_proj": "k", "value_proj": "v", "q_lin": "q", "k_lin": "k", "v_lin": "v", "out_lin": "o",
}  # fmt: skip
CROSS_ATTENTION_NAMES = ("crossattention", "cross_attn", "cross_attention", "EncDecAttention", "encoder_attn")
FEED_FORWARD_NAMES: dict[str, RoleName] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "fc1": "up", "fc2": "down", "c_fc": "up", "c_proj": "down", "fc_in": "up", "fc_out": "down",
    "dense_h_to_4h": "up", "dense_4h_to_h": "down", "lin1": "up", "lin2": "down",
    "wi": "up", "wi_0": "gate", "wi_1": "up", "wo": "down",
}  # fmt: skip
# Mixtral's names of old, and LFM2's: they mean this only where all three are there.
NUMBERED_FEED_FORWARD: dict[str, RoleName] = {"w1": "gate", "w2": "down", "w3": "up"}
ROUTER_NAMES = ("gate", "router")
MIXER_NAMES = ("mixer", "linear_attn", "mamba", "ssm")
HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier")


@dataclass(frozen=True)
class Role:
    """What one parameter, or one block of a fused one, is.

    Attributes:
        parameter: Its name, as in `model.named_parameters()` of the base model.
        name: "q", "k", "v", "o", "gate", "up", "down", "norm", "router", "embedding", "head" or "unknown"; in a mixer
            (linear attention, state space) "mixer" for its matrices and "state" for what it holds itself, such as
            A_log, D and dt_bias. A bias has its matrix's. A gate on a shared expert is a router.
        selection: The block: everything, or some output units of a fused weight (rows; columns of a `Conv1D`; entries
            of a bias, which is one row); of a tensor that holds all experts, the rows of one.
        module: Name of the module that holds the parameter.
        stack: Name of the `nn.ModuleList` the parameter's layer stands in; "" outside the layers.
        layer: Its place there, from 0; None outside the layers.
        block: Which part of the layer it is a matrix of: "attention", "cross-attention", "feed-forward", "expert",
            "shared-expert" or "mixer"; "" for all others, norms and routers among them.
        expert: Which expert of the layer, from 0; None elsewhere.
        tower: "" in the main tower, which is the one that reads the input embeddings: the language model of a
            vision-language model, both stacks of an encoder–decoder, and most often everything. Elsewhere the name of
            the module beside it, like "model.vision_tower" or "model.multi_modal_projector".
    """

    parameter: str
    name: RoleName
    selection: Selection
    module: str
    stack: str
    layer: int | None
    block: BlockName = ""
    expert: int | None = None
    tower: str = ""


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
    tree = Tree(model)
    found = []
    for parameter_name, name, module, parameter in walk_parameters(model):
        stack, layer = tree.place(name)
        own = parameter_name.rpartition(".")[2]
        kind, blocks = _identify(tree, name, module, own, logical_shape(module, own, parameter))
        tower = "" if id(module) in tree.heads else tree.tower(name)
        expert = tree.expert(name, stack) if layer is not None else None
        for block in blocks:
            part = kind if block.role not in ("norm", "router", "embedding", "head", "unknown") else ""
            e = expert if block.expert is None else block.expert
            found.append(Role(parameter_name, block.role, block.selection, name, stack, layer, part, e, tower))
    return found


def _identify(
    tree: Tree, name: str, module: nn.Module, own: str, shape: tuple[int, ...]
) -> tuple[BlockName, list[Block]]:
    """(part of the layer, blocks) of the parameter `own` of a module."""
    parent, _, leaf = name.rpartition(".")
    stack, layer = tree.place(name)
    whole = Selection.whole(shape)

    def all_of_it(role: RoleName) -> list[Block]:
        return [Block(role, whole)]

    if id(module) in tree.embeddings:
        return "", all_of_it("embedding")
    if isinstance(module, nn.Embedding):
        # Inside a layer it is something else, such as T5's bias by distance.
        return "", all_of_it("embedding" if layer is None or name == f"{stack}.{layer}" else "unknown")
    if id(module) in tree.heads or (layer is None and leaf in HEAD_NAMES):
        return "", all_of_it("head")
    if all(len(inner) <= 1 for inner in shapes_of(module).values()):
        return "", all_of_it("norm" if "norm" in type(module).__name__.lower() else "unknown")
    if layer is not None and n_fused_experts(module):
        return "expert", fused_experts(module, own, shape)
    if leaf in FUSED_ATTENTION_NAMES:
        outputs = [(n, tree.child(parent, n)) for n in tree.children[parent] if ATTENTION_NAMES.get(n) == "o"]
        return _attention_kind(name), fused_attention(module, shape, leaf, outputs, tree.config)
    if leaf == FUSED_FEED_FORWARD:
        return _feed_forward_kind(tree, name), fused_feed_forward(module, shape)
    if _is_attention(tree, parent):
        return _attention_kind(name), all_of_it(ATTENTION_NAMES.get(leaf, "unknown"))
    if layer is None or name == f"{stack}.{layer}":
        return "", all_of_it("unknown")  # outside the layers, or a layer's own
    if _is_output_of_attention(tree, name):
        return _attention_kind(name), all_of_it("o")
    if _is_router(tree, name, module):
        return "", all_of_it("router")
    if role := _feed_forward(tree, parent).get(leaf) or _intermediate_feed_forward(tree, name):
        return _feed_forward_kind(tree, name), all_of_it(role)
    if mixer := _mixer(tree, name, f"{stack}.{layer}"):
        return "mixer", all_of_it("state" if name == mixer else "mixer")
    return "", all_of_it("unknown")


def _is_attention(tree: Tree, name: str) -> bool:
    """An attention holds q, k and v, apart or fused."""
    children = tree.children[name]
    apart = {ATTENTION_NAMES.get(child) for child in children}
    return {"q", "k", "v"} <= apart or not FUSED_ATTENTION_NAMES.isdisjoint(children)


def _attention_kind(name: str) -> BlockName:
    return "cross-attention" if set(CROSS_ATTENTION_NAMES).intersection(name.split(".")) else "attention"


def _is_output_of_attention(tree: Tree, name: str) -> bool:
    """BERT's `attention.output.dense`: the one matrix beside `attention.self`, which has q, k and v alone."""
    parent, _, leaf = name.rpartition(".")
    around, _, parent_leaf = parent.rpartition(".")
    beside = [join(around, child) for child in tree.children.get(around, ()) if child != parent_leaf]
    inner = [other for other in beside if _is_attention(tree, other)]
    return (
        len(inner) == 1
        and not any(ATTENTION_NAMES.get(child) == "o" for child in tree.children[inner[0]])
        and leaf == "dense"
        and [child for child in tree.children[parent] if width(tree.child(parent, child), "input")] == [leaf]
    )


def _feed_forward(tree: Tree, name: str) -> dict[str, RoleName]:
    """{child: role} of a module that holds at least up and down, or gate and up as one and down; else nothing."""
    children = tree.children[name]
    if set(NUMBERED_FEED_FORWARD).issubset(children):
        return NUMBERED_FEED_FORWARD
    found = {child: FEED_FORWARD_NAMES[child] for child in children if child in FEED_FORWARD_NAMES}
    whole = {"up", "down"} <= set(found.values()) or (FUSED_FEED_FORWARD in children and "down" in found.values())
    return found if whole else {}


def _intermediate_feed_forward(tree: Tree, name: str) -> RoleName | None:
    """BERT's `intermediate.dense`, and `output.dense`, which reads what that one writes."""
    parent, _, leaf = name.rpartition(".")
    around, _, parent_leaf = parent.rpartition(".")
    up, down = (tree.modules.get(join(around, f"{part}.dense")) for part in ("intermediate", "output"))
    if leaf != "dense" or up is None or down is None or width(up, "output") != width(down, "input"):
        return None
    return {"intermediate": "up", "output": "down"}.get(parent_leaf)  # type: ignore[return-value]


def _feed_forward_kind(tree: Tree, name: str) -> BlockName:
    """An expert, what stands beside experts, or the only one."""
    stack, _ = tree.place(name)
    around = name.rpartition(".")[0].rpartition(".")[0]
    if tree.expert(name, stack) is not None:
        return "expert"
    return "shared-expert" if _n_experts(tree, around) else "feed-forward"


def _n_experts(tree: Tree, name: str) -> int:
    """Experts of a mixture, which has them as a child: a list, or one module with 3-D tensors."""
    for leaf in tree.children.get(name, ()):
        if n := tree.n_experts_in(join(name, leaf)) or n_fused_experts(tree.child(name, leaf)):
            return n
    return 0


def _is_router(tree: Tree, name: str, module: nn.Module) -> bool:
    """What stands beside experts and has one output for each, or one for the shared expert."""
    parent, _, leaf = name.rpartition(".")
    around, _, parent_leaf = parent.rpartition(".")
    n_outputs = width(module, "output")
    if n := _n_experts(tree, parent):
        return (leaf in ROUTER_NAMES and n_outputs == n) or (leaf.startswith("shared_expert") and n_outputs == 1)
    return parent_leaf in ROUTER_NAMES and n_outputs is not None and n_outputs == _n_experts(tree, around)


def _mixer(tree: Tree, name: str, layer: str) -> str | None:
    """The mixer that a module is, or is in: it mixes the tokens of a sequence in another way than an attention.

    The outermost module in the layer that holds matrices and a convolution over the tokens, a recurrence's `A_log`,
    or a mixer's name; but nothing inside it may be an attention, a feed-forward or a mixture of experts.
    """
    parts = name.removeprefix(f"{layer}.").split(".")
    for depth in range(1, len(parts) + 1):
        mixer = ".".join([layer, *parts[:depth]])
        module = tree.modules[mixer]
        direct = [tree.child(mixer, leaf) for leaf in tree.children[mixer]]
        if (
            any(isinstance(child, nn.Conv1d) for child in direct)
            or "A_log" in module._parameters
            or (tree.children[mixer] and any(word in parts[depth - 1].lower() for word in MIXER_NAMES))
        ):
            other = (
                _is_attention(tree, n) or _feed_forward(tree, n) or _n_experts(tree, n) for n in tree.inside(mixer)
            )
            return None if any(other) else mixer
    return None
