"""Adapters of PEFT's other methods, such as LoRA: what they add to each weight, by PEFT's own merging."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import nn

from ..deltas.delta import all_finite
from ..deltas.targets import tied_names
from ..errors import FormatError, IsolateError, RegionError
from ..regions.region import base_module, unwrap, walk_parameters
from .adapter import PREFIX, WEIGHTS, any_config
from .shards import TensorFile
from .weights import Weights, tuner_layers

# With these the base that an adapter is trained over is not W0: a part of it was moved into the adapter.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load_foreign(base: Weights, folder: Path) -> nn.Module:
    """A PeftModel of an adapter that lies in a folder, over a base without numbers.

    Raises:
        IsolateError: The adapter changes no weights, needs the base's numbers to be loaded, or moves a part of W0 into
            itself; or the base is no model that PEFT could wrap.
        RegionError: It is another model's, or carries tensors whole.
        FormatError: Its file is damaged.
    """
    name, config = str(folder), any_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise IsolateError(f"{name!r} has no {WEIGHTS!r}: other formats are not read, save it with save_pretrained()")
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or kind == "XLORA":
        raise IsolateError(f"{name!r} is an adapter of {kind}, which changes no weights: there is no Δ")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.startswith(CHANGE_THE_BASE):
        raise IsolateError(
            f"{name!r} was begun with init_lora_weights={start!r}, which takes a part of the base into the adapter: "
            "merge it with PEFT's merge_and_unload(), and pass the merged model"
        )
    if not hasattr(base.model, "config") or tuner_layers(base.model):
        raise IsolateError(
            f"{name!r} is an adapter of {kind}, which PEFT puts into a model of transformers, and the base is "
            f"{'wrapped already' if tuner_layers(base.model) else 'not one'}: pass the base's folder, or the model"
        )
    entries = TensorFile(folder / WEIGHTS).entries
    there = sum(math.prod(entry.shape) for entry in entries.values())
    if isinstance(rank := getattr(config, "r", 0), int) and rank > there:
        # Some methods allocate by it, before anything is loaded.
        raise FormatError(
            f"{name!r} claims rank {rank:,}, and its file has {there:,} numbers: one of the two was altered"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is missing is an error here
            empty: Any = without_numbers(base.model)
            without = {parameter: tensor for parameter, _, _, tensor in walk_parameters(empty, tied=True)}
            model: Any = PeftModel.from_pretrained(
                empty, name, low_cpu_mem_usage=True, torch_device="cpu", autocast_adapter_dtype=False
            )
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise RegionError(
            f"{name!r} does not go onto {base.name!r} ({type(error).__name__}: {' '.join(reason[:2])}): it was "
            "trained on another model, or its files are of different adapters"
        ) from error
    check_nothing_beside(model, name)
    written_along = _take_out(model, without, base, name)
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if different := sorted(
        key for key in wanted ^ entries.keys() if key.replace(".base_layer.", ".") not in written_along
    ):
        raise RegionError(
            f"{different[0]!r} is only in the {'model' if different[0] in wanted else 'file'} when {name!r} is loaded "
            f"onto {base.name!r}: it was trained on another one, or its files are of different adapters"
        )
    layers: list[Any] = list(tuner_layers(model))
    for layer in layers:
        for key, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if not key.startswith("base_layer.") and (tensor.is_meta or not all_finite(tensor)):
                raise IsolateError(
                    f"{key!r} of {name!r} is not in its file, or not finite there, or made from the base's "
                    "numbers: load base and adapter with PEFT, and pass the PeftModel"
                )
    return model


def _take_out(model: nn.Module, without: dict[str, nn.Parameter], base: Weights, name: str) -> set[str]:
    """Put nothing back where an adapter's file brought base weights, which are the base's own.

    PEFT writes embeddings along that nobody trained, and those that it adds a LoRA to. Tied ones come apart by it.

    Args:
        model: With the adapter.
        without: {parameter, by all of its names: as it was before}.
        base: Whose numbers these must be.
        name: Of the adapter.

    Returns:
        What the adapter's file calls them, but for `base_layer`.

    Raises:
        RegionError: They are others.
    """
    first = {twin: one for one, twins in tied_names(base.model, base).items() for twin in twins}
    found = set()
    for parameter, _, module, tensor in list(walk_parameters(model, tied=True)):
        if tensor is without.get(parameter) or _is_nothing(tensor):
            continue
        if not equal(tensor, base.read(first.get(parameter, parameter))):
            raise RegionError(
                f"{name!r} carries the base weight {parameter!r} whole, with other numbers than {base.name!r} has: "
                "pass the base that it was trained on; or merge it into its base, and pass the merged model"
            )
        found.add(f"{PREFIX}{parameter}")
        module._parameters[parameter.rpartition(".")[2]] = without[parameter]
    return found


@torch.no_grad()
def merged_delta(layer: BaseTunerLayer, parameter: str, w0: Callable[[str], torch.Tensor], where: str) -> torch.Tensor:
    """What the active adapters of a layer add to a parameter of the module that it wraps, float64, on the CPU.

    A copy of the layer is merged over W0 in float64, by PEFT's own code: so for every method, also for those that
    multiply, and without what rounding in W0's dtype would lose.

    Args:
        layer: The outermost one around the module.
        parameter: Its name in the module.
        w0: Gives W0 by such a name.
        where: For the message.

    Raises:
        IsolateError: The method cannot be merged.
    """
    module = base_module(layer)  # type: ignore[arg-type]
    own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    before = {name: w0(name).to("cpu", torch.float64, copy=True) for name in own}
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(before[name].clone(), requires_grad=False) for name, tensor in own.items()
    }
    try:
        twin: Any = copy.deepcopy(layer, memo)
        twin.to("cpu", torch.float64)
        for each in reversed(list(chain(twin))):
            each.merge(safe_merge=False)
    except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise IsolateError(
            f"{type(layer).__name__} of {where!r} cannot be merged over {parameter!r} ({type(error).__name__}: "
            f"{error}): merge it into a model with PEFT's merge_and_unload(), and pass that"
        ) from error
    after = base_module(twin)._parameters[parameter]
    assert after is not None
    return after.detach().sub_(before[parameter])


def chain(layer: Any) -> Iterator[BaseTunerLayer]:
    """The layers around one module, outermost first: PEFT wraps again for each parameter that is no `weight`."""
    while isinstance(layer, BaseTunerLayer):
        yield layer
        layer = getattr(layer, "base_layer", None)


def check_nothing_beside(model: nn.Module, name: str) -> None:
    """Raise `RegionError` where adapters train whole tensors beside what they add to weights."""
    for path, module in unwrap(model).named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise carries(name, repr(path))
    for config in getattr(model, "peft_config", {}).values():
        if (bias := getattr(config, "bias", "none")) != "none":
            raise carries(name, f"biases (bias={bias!r})")


def carries(adapter: str, what: str) -> RegionError:
    """An adapter has more than differences on a region."""
    return RegionError(
        f"{adapter!r} carries {what} whole (modules_to_save, trained tokens, biases), which is no difference on a "
        "region: merge it into the base, and pass the merged model"
    )


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, and the same numbers in the dtype of ours."""
    return torch.equal(ours.cpu(), theirs.to("cpu", ours.dtype))


def without_numbers(model: nn.Module) -> nn.Module:
    """A copy of a model in which every number is NaN, and which takes no memory for them.

    On the meta device PEFT could load nothing, since it moves an adapter to where the base is; and what an adapter
    makes of a base's numbers shows, as NaN.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        nothing = torch.nan if tensor.is_floating_point() else 0
        empty = torch.full((), nothing, dtype=tensor.dtype, device="cpu").expand(tensor.shape)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _is_nothing(tensor: torch.Tensor) -> bool:
    return not tensor.numel() or tensor.is_meta or bool(tensor[(0,) * tensor.ndim].isnan())
