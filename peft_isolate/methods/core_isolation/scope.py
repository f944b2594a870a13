"""D, the scalars that CPI-FT chooses among: everything but the embeddings and the head."""

from __future__ import annotations

from torch import nn

from ...deltas.targets import tied_names
from ...evaluation.rows import flag
from ...regions.roles import Role, roles


def scope(model: nn.Module, include_embeddings: bool = False) -> list[str]:
    """Names of the parameters in scope, in the model's order: all but the embeddings, norms and biases among them.

    A choice, since the paper does not say: without embeddings, head and what is tied to another parameter. Where they
    are included, a tied one comes once. A vision-language model's other towers are out, and so is what a module holds
    itself beside modules in scope (the A_log of a state-space mixer): PEFT cannot wrap both.

    Args:
        model: Any module, on the meta device, too; adapters that already wrap it are looked through.
        include_embeddings: Whether embeddings, head and tied parameters are in.

    Raises:
        IsolateError: `include_embeddings` is neither True nor False.
    """
    flag("include_embeddings", include_embeddings)
    return [role.parameter for role in roles_in_scope(model, roles(model), include_embeddings)]


def roles_in_scope(model: nn.Module, every: list[Role], include_embeddings: bool = False) -> list[Role]:
    """Those of the roles of a model that are in scope, one a parameter, see `scope`."""
    names = list(dict.fromkeys(role.parameter for role in every))
    first = {role.parameter: role for role in reversed(every)}  # of a fused one, the first block stands for all
    tied = {} if include_embeddings else tied_names(model, names)
    chosen = [
        role
        for role in map(first.__getitem__, names)
        if not role.tower and (include_embeddings or not (is_embedding(role) or role.parameter in tied))
    ]
    return without_outer(chosen)


def is_embedding(role: Role) -> bool:
    """Whether it is of the embeddings or the head; what is embedded inside a layer, such as positions, is not."""
    return role.layer is None and role.name in ("embedding", "head")


def without_outer(chosen: list[Role]) -> list[Role]:
    """Without the parameters of modules that hold other modules with parameters among them."""
    modules = {role.module for role in chosen}
    outer = {parent for module in modules for parent in _parents(module)}
    return [role for role in chosen if role.module not in outer]


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]
