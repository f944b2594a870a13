"""The modules of a base model by name, and where in the model each stands: layer, expert, tower."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .region import base_module, unwrap

OTHER_TOWERS = ("vision_config", "audio_config")


class Tree:
    """The base modules of a model by the names they had before anything was wrapped; adapters' own are left out.

    Attributes:
        modules: {name: module}, in the model's order; the model itself is "".
        children: {name: names of the module's own children, the last part only}.
        embeddings: Ids of the modules that the model calls its input embeddings.
        heads: Ids of the modules that it calls its output embeddings.
        config: Of the language model; None where the model has no config.
    """

    def __init__(self, model: nn.Module) -> None:
        model = unwrap(model)
        self.modules = dict(_visit(model, ""))
        self.children: dict[str, list[str]] = {name: [] for name in self.modules}
        for name in self.modules:
            if name:
                parent, _, leaf = name.rpartition(".")
                self.children[parent].append(leaf)
        self.embeddings = {id(base_module(module)) for module in _ask(model, "get_input_embeddings")}
        self.heads = {id(base_module(module)) for module in _ask(model, "get_output_embeddings")}
        config: Any = getattr(model, "config", None)
        self.config = text_config(model)
        self._main = self._main_tower(model, config)

    def child(self, name: str, leaf: str) -> nn.Module:
        """A child of the module `name`."""
        return self.modules[join(name, leaf)]

    def inside(self, name: str) -> Iterator[str]:
        """Names of the module itself and of all modules in it."""
        yield name
        for leaf in self.children[name]:
            yield from self.inside(join(name, leaf))

    def place(self, name: str) -> tuple[str, int | None]:
        """(name of the outermost module list on the way, index in it): experts in a layer do not count as layers."""
        for depth, stack in enumerate(_ways(name), start=1):
            leaf = name.split(".")[depth]
            if isinstance(self.modules.get(stack), nn.ModuleList) and leaf.isdigit():
                return stack, int(leaf)
        return "", None

    def expert(self, name: str, stack: str) -> int | None:
        """Place of the module in a list of experts, which stands inside a layer of the `stack` and is called so."""
        for container in _ways(name):
            if self.n_experts_in(container) and container.startswith(f"{stack}."):
                return self.children[container].index(name[len(container) + 1 :].partition(".")[0])
        return None

    def n_experts_in(self, container: str) -> int:
        """Members of a list of experts, each of which has modules of its own; 0 for any other module."""
        leaf = container.rpartition(".")[2]
        if not isinstance(self.modules.get(container), nn.ModuleList | nn.ModuleDict):
            return 0
        members = self.children[container]
        listed = "expert" in leaf and "shared" not in leaf and all(self.children[f"{container}.{m}"] for m in members)
        return len(members) if listed else 0

    def tower(self, name: str) -> str:
        """Name of the tower that a module stands in, see `Role`."""
        if self._main is None or is_inside(name, self._main):
            return ""
        own, main = name.split("."), self._main.split(".")
        shared = next((i for i, (left, right) in enumerate(zip(own, main, strict=False)) if left != right), len(own))
        return ".".join(own[: shared + 1])

    def _main_tower(self, model: nn.Module, config: Any) -> str | None:
        """The smallest module with the input embeddings and their stack; None where everything is one tower.

        That there are several is the model's own word: its config has one for the text, and others. The encoder and
        the decoder of an encoder–decoder belong together, wherever its embeddings stand.
        """
        if config is None or (self.config is config and not any(hasattr(config, name) for name in OTHER_TOWERS)):
            return None
        together = {id(base_module(module)) for module in _ask(model, "get_input_embeddings")}
        if getattr(config, "is_encoder_decoder", False):
            together |= {id(base_module(m)) for getter in ("get_encoder", "get_decoder") for m in _ask(model, getter)}
        names = [name for name, module in self.modules.items() if id(module) in together]
        stacks = {self.place(name)[0] for name, module in self.modules.items() if module._parameters} - {""}
        for root in [*reversed(list(_ways(names[0]))), ""] if names else []:
            if all(is_inside(name, root) for name in names) and any(is_inside(stack, root) for stack in stacks):
                return None if all(is_inside(stack, root) for stack in stacks) else root
        return None


def text_config(model: nn.Module) -> Any:
    """The config of a model, inside adapters too; of one with several towers that of its language model.

    None where the model has no config.
    """
    config: Any = getattr(unwrap(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def head_of(model: nn.Module) -> Any:
    """What makes logits of hidden states in a model, inside adapters too; None where the model does not tell."""
    return next(iter(_ask(unwrap(model), "get_output_embeddings")), None)


def join(name: str, leaf: str) -> str:
    """Name of a child of the module `name`, which is "" for the model itself."""
    return f"{name}.{leaf}" if name else leaf


def is_inside(name: str, module: str) -> bool:
    """Whether a name is a module's or that of something in it."""
    return not module or name == module or name.startswith(f"{module}.")


def _ways(name: str) -> Iterator[str]:
    """Names of the modules around this one, outermost first, the model itself left out."""
    parts = name.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))


def _visit(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    module = base_module(module)
    yield name, module
    for child_name, child in module.named_children():
        yield from _visit(child, join(name, child_name))


def _ask(model: nn.Module, getter: str) -> list[nn.Module]:
    """What a transformers model answers, or nothing: some raise where they have no such module."""
    try:
        answer = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return []
    return [answer] if isinstance(answer, nn.Module) else []
