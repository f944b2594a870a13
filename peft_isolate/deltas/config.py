"""The part of a PEFT config that all methods share: PEFT's own fields, and the region once it is chosen."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from peft import PeftConfig
from torch import nn

from ..errors import FormatError, IsolateError, RegionError
from ..regions.region import Region, check_shape, is_plain, shapes_of, walk_parameters
from ..regions.selection import Selection
from ..regions.stored import Place, StoredSelection, place_from_dict, storable
from ..regions.tree import Tree
from .beside import can_stand_beside
from .delta import HELD, TRAINED
from .packed import VALUES, Packing, inference_only
from .soft_mask import SoftMask, units_on
from .targets import is_excluded, tied_names, token_modules

# The shared fields that decide the region; each method adds its own in `chosen_by`.
CHOSEN_BY = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "train_bias",
)  # fmt: skip
# Fields that may be one name or a regular expression, and those in whose lists every name is one.
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")
LISTS_OF_PATTERNS = ("layers_pattern", "modules_to_save")
SAVE_DTYPES = ("bfloat16", "float16", "float32")


class Resolved(NamedTuple):
    """Where an adapter acts on a model.

    Attributes:
        trained: {parameter: what learns in this round}.
        held: {parameter: what earlier rounds left on the rest}.
        masks: {parameter: the soft mask of what learns}, for those that have one.
    """

    trained: dict[str, Place]
    held: dict[str, Place]
    masks: dict[str, SoftMask]

    @property
    def region(self) -> Region:
        """The trained region. Raises `FormatError` where which elements it has is yet to be loaded."""
        return _region(self.trained)

    @property
    def held_region(self) -> Region:
        """What earlier rounds left. Raises as `region` does."""
        return _region(self.held)

    @property
    def is_complete(self) -> bool:
        """Whether all positions are known, without the adapter's tensors."""
        places = [*self.trained.values(), *self.held.values()]
        return all(isinstance(place, Selection) or place.data is not None for place in places)


def _region(places: Mapping[str, Place]) -> Region:
    return Region({name: p if isinstance(p, Selection) else p.selection() for name, p in places.items()})


@dataclass
class DeltaConfig(PeftConfig):
    """Base of the configs of all methods. Fields that PEFT has, too, mean what they mean in `LoraConfig`.

    Args:
        target_modules: Names, a regular expression or "all-linear". Replaces the roles as the pool from which the
            method chooses, so that it works on any `nn.Module`. None: by role.
        exclude_modules: Names or a regular expression; subtracted last.
        layers_to_transform: Layer indices to stay in.
        layers_pattern: Name of the layer list, where the model has several.
        modules_to_save: Modules to train and save whole, beside the deltas and outside this library's promises.
        trainable_token_indices: Embedding rows to train, as in PEFT, likewise outside.
        target_parameters: Names of single parameters, for modules that are no linear layers. With `target_modules` or
            alone, they replace the roles as the pool.
        init_weights: Start at zero. False draws small random deltas, for tests.
        train_bias: A bias is trained with its matrix (and a norm's with its weight).
        bias: Must stay "none": PEFT's other values train base tensors in place.
        save_dtype: "bfloat16" or "float16" halves the saved adapter, with a rounding that is reported; "float32", or
            None for the dtype it has in memory.
        packed: What the numbers were packed as by `compress`: "bf16", "fp16", "int8" or "exact"; such an adapter is
            for inference only. None for one of plain tensors.
        resolved: The region that was chosen, what it was chosen with, what earlier rounds left, and the fingerprint of
            the base. Set when a model is wrapped, saved with the adapter, and used as it is from then on; None chooses
            anew.
        plugin: Names the package that a process must import before it can load the adapter.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None)
    target_parameters: list[str] | None = field(default=None)
    init_weights: bool = field(default=True)
    train_bias: bool = field(default=True)
    bias: str = field(default="none")
    save_dtype: str | None = field(default=None)
    packed: str | None = field(default=None)
    resolved: dict[str, Any] | None = field(default=None)
    plugin: str = field(default="peft_isolate")

    # The fields of the method that decide the region: a resolved config may not contradict them.
    chosen_by: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str] = ""  # what the method is called
    paper: ClassVar[str] = ""  # its address

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_types()
        self._check_patterns()
        self.forget_tensors()
        self.remembered: Any = None  # what a model card will say, see `readme`
        # Made from a file, and not filled from it yet.
        self.awaits_file = self.resolved is not None
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, set(value))  # as PEFT's own configs do: the order means nothing
        self._check_bias()
        if self.save_dtype is not None and self.save_dtype not in SAVE_DTYPES:
            raise IsolateError(f"save_dtype={self.save_dtype!r} is unknown: use None or one of {SAVE_DTYPES}")
        if self.packed is not None and self.packed not in VALUES:
            raise FormatError(
                f"packed={self.packed!r} is unknown, this version reads {VALUES}: the adapter is of a newer version "
                "or its config was altered; update peft_isolate, or load it again from where it came"
            )
        if self.layers_to_transform is not None and not isinstance(self.layers_to_transform, int):
            self.layers_to_transform = list(self.layers_to_transform) or None
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise IsolateError(
                f"layers_to_transform={self.layers_to_transform!r} cannot be used with the pattern target_modules="
                f"{self.target_modules!r}: put the layers into a regular expression, or pass a list of names"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise IsolateError(
                f"layers_pattern={self.layers_pattern!r} says where to count layers, but layers_to_transform is not "
                "set: set both"
            )

    def _check_types(self) -> None:
        """Refuse fields that PEFT would take as they are, from a config that a stranger wrote."""
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters"):
            value = getattr(self, name)
            if not (value is None or _all(value, str) or (isinstance(value, str) and name in PATTERNS)):
                raise IsolateError(f"{name}={value!r}: give a list of names")
        for name in ("train_bias", "init_weights"):
            if not isinstance(value := getattr(self, name), bool):
                raise IsolateError(f"{name}={value!r}: use True or False")
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str | os.PathLike)):
                raise IsolateError(f"{name}={value!r}: give a name")
        layers = self.layers_to_transform
        if not (layers is None or isinstance(layers, int) or _all(layers, int)):
            raise IsolateError(f"layers_to_transform={layers!r}: give a number or a list of numbers")
        tokens = self.trainable_token_indices
        of_modules = tokens if isinstance(tokens, dict) else {"": [] if tokens is None else tokens}
        if not (_all(of_modules, str) and all(_all(rows, int) for rows in of_modules.values())):
            raise IsolateError(
                f"trainable_token_indices={tokens!r}: give a list of row numbers, or one for each name of a module"
            )

    def _check_patterns(self) -> None:
        """Refuse what is no regular expression: PEFT compiles them as late as it looks for modules."""
        for name in (*PATTERNS, "modules_to_save"):
            value = getattr(self, name)
            patterns = [value] if isinstance(value, str) else (value or ()) if name in LISTS_OF_PATTERNS else ()
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise IsolateError(
                        f"{name}={pattern!r} is no regular expression ({error}): put a backslash before signs that "
                        "shall stand for themselves"
                    ) from error

    def _check_bias(self) -> None:
        if self.bias != "none":
            raise IsolateError(
                f"bias={self.bias!r} would train biases of the base in place, which no delta could undo: leave "
                "bias='none'; a bias is trained with its matrix (train_bias=True): target the role or module it is in"
            )

    @property
    def names_its_pool(self) -> bool:
        """Whether `target_modules` or `target_parameters` says what to choose from, instead of the roles."""
        return self.target_modules is not None or self.target_parameters is not None

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON can hold it."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and where an adapter is being saved with it, its model card."""
        super().save_pretrained(save_directory, **kwargs)
        from .about.readme import write_remembered  # which reads configs itself

        write_remembered(self, save_directory)

    def choose(self, model: nn.Module) -> Region:
        """The region that the method trains on this model. Each method has its own; a pure function of both."""
        raise TypeError(f"{type(self).__name__} does not say how it chooses a region")

    def soft_masks(self, model: nn.Module, region: Region) -> dict[str, SoftMask]:
        """{parameter: soft mask} for the region that was chosen. Of most methods none."""
        return {}

    def consume(self) -> None:
        """What was given to this config, and now is the adapter's, need not be kept here. Called by `record`."""

    def remarks(self, masks: Mapping[str, SoftMask]) -> list[str]:
        """What a user should know beside the region: `plan` prints it, wrapping a model logs it.

        Args:
            masks: The soft masks that apply.
        """
        return []

    def resolve(self, model: nn.Module) -> Resolved:
        """Where this adapter acts on this model: as recorded in `resolved`, or chosen now. Changes nothing.

        Raises:
            RegionError: Nothing is selected; a recorded region is another model's or contradicts the config; a
                selected tensor is one that no delta can be put on: see the message.
            FormatError: `resolved` is no record of a region.
        """
        self._check_bias()
        if self.resolved is not None:
            self._check_record()
            self._check_unchanged()
            resolved = self._recorded(model)
        elif self.packed is not None:
            raise inference_only(
                f"an adapter that is yet to be trained cannot be: the config's packed={self.packed!r}"
            )
        else:
            region = self._without_excluded(self.choose(model))
            if not region:
                raise RegionError(
                    f"{type(self).__name__} selects nothing of {type(model).__name__}: target_modules="
                    f"{_plain(self.target_modules)!r}, target_parameters={self.target_parameters!r}, "
                    f"layers_to_transform={self.layers_to_transform!r}, exclude_modules="
                    f"{_plain(self.exclude_modules)!r}; compare with the names in model.named_modules()"
                )
            resolved = Resolved(dict(region.places), {}, self.soft_masks(model, region))
        self._check_trainable({*resolved.trained, *resolved.held}, model)
        return resolved

    def record(
        self,
        trained: Region,
        model: nn.Module,
        base: str | None,
        held: Region | None = None,
        masks: Mapping[str, SoftMask] | None = None,
    ) -> None:
        """Write the region into `resolved`, so that it is saved with the adapter and never chosen again.

        Args:
            trained: What learns.
            model: The base model.
            base: Its fingerprint.
            held: What earlier rounds left.
            masks: The soft masks of what learns.
        """
        places = {
            "region": {name: storable(place) for name, place in trained.places.items()},
            "held": {name: storable(place) for name, place in (held or Region()).places.items()},
        }
        self.resolved = {
            "chosen_by": {name: _plain(getattr(self, name)) for name in (*CHOSEN_BY, *self.chosen_by)},
            "layers": _layers_digest(model),
            "base": base,
            **{part: {name: place.to_dict() for name, place in of_part.items()} for part, of_part in places.items()},
            "masks": {name: mask.to_dict() for name, mask in (masks or {}).items()},
        }
        self.forget_tensors()
        self.awaits_file = False
        self._masks |= masks or {}
        self.consume()
        # Which elements, `resolved` is no place for; but this very object may serve to wrap another copy of the model.
        self._stored |= {
            (part, name): place
            for part, of_part in places.items()
            for name, place in of_part.items()
            if isinstance(place, StoredSelection)
        }

    def learn_positions(self, trained: Region, held: Region) -> None:
        """Have at hand which single elements the record means, from the adapter's file."""
        for part, region in (("region", trained), ("held", held)):
            for name, place in region.places.items():
                if isinstance(stored := storable(place), StoredSelection):
                    self._stored[part, name] = stored

    def forget_tensors(self) -> None:
        """The positions and importances that this object has at hand are not the adapter's any more."""
        self._stored: dict[tuple[str, str], StoredSelection] = {}
        self._masks: dict[str, SoftMask] = {}

    def recorded(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Resolved:
        """Where this adapter acts, as recorded in `resolved`, without a look at a model.

        Args:
            shapes: {parameter: shape} of the model, where there is one: then every claim is held against it.

        Raises:
            RegionError: It is another model's.
            FormatError: `resolved` is no record of a region.
        """
        self._check_record()
        record = self.resolved
        assert record is not None
        resolved = Resolved({}, {}, {})
        for places, part in ((resolved.trained, "region"), (resolved.held, "held")):
            for name, entry in record.get(part, {}).items():
                # Shapes first: what a stranger's file claims could cost any amount of memory to expand.
                if shapes is not None and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
                    check_shape(name, tuple(entry["shape"]), shapes)
                place = place_from_dict(entry)
                at_hand = self._stored.get((part, name))
                places[name] = at_hand if at_hand is not None and at_hand == place else place
        for name, entry in record.get("masks", {}).items():
            mask, learns = SoftMask.from_dict(entry), resolved.trained.get(name)
            if not isinstance(learns, Selection) or mask.count != units_on(learns, mask.axis):
                raise FormatError(
                    f"the soft mask {entry!r} of {name!r} does not fit {learns!r}, what learns of it: the adapter's "
                    "config was altered; restore it"
                )
            at_hand_mask = self._masks.get(name)
            resolved.masks[name] = at_hand_mask if at_hand_mask is not None and at_hand_mask == mask else mask
        return resolved

    def packings(self, resolved: Resolved) -> dict[str, Packing]:
        """{parameter: what is known of its packed delta}; empty where the adapter is one of plain tensors.

        Args:
            resolved: What `resolve` or `recorded` gave: what may be claimed is bounded by it.

        Raises:
            FormatError: A size is none that a buffer of this selection can have.
        """
        sizes = (self.resolved or {}).get("packed", {})
        names = {*resolved.trained, *resolved.held} if self.packed is not None else set()
        if not isinstance(sizes, dict) or sizes.keys() != names:
            raise FormatError(
                f"packed={self.packed!r} does not go with the packed deltas that `resolved` describes: the adapter's "
                "config was altered; restore it"
            )
        found = {}
        for name, n_bytes in sizes.items():
            parts = ((TRAINED, resolved.trained), (HELD, resolved.held))
            places = {part: of_part[name] for part, of_part in parts if name in of_part}
            found[name] = Packing.of(str(self.packed), n_bytes, places)
        return found

    def _recorded(self, model: nn.Module) -> Resolved:
        resolved = self.recorded(shapes_of(model))
        if (self.resolved or {}).get("layers") != _layers_digest(model):
            raise RegionError(
                f"the region in `resolved` fits {type(model).__name__}, but was chosen on a model with other layers "
                "(more of them, perhaps): for a new choice pass dataclasses.replace(config, resolved=None)"
            )
        return resolved

    def _check_record(self) -> None:
        record: Any = self.resolved
        sound = isinstance(record, dict) and isinstance(record.get("base"), str | None)
        parts: list[Any] = (
            [record.get(name, {}) for name in ("chosen_by", "region", "held", "masks")] if sound else [None]
        )
        if not all(isinstance(part, dict) for part in parts) or not (parts[1] or parts[2]):
            raise FormatError(
                "`resolved` in the adapter's config is no record of a region: the file was altered or is of another "
                "version; restore it, or draw the region again with resolved=None"
            )

    def _check_unchanged(self) -> None:
        assert self.resolved is not None
        for name, then in self.resolved.get("chosen_by", {}).items():
            now = _plain(getattr(self, name, None))
            if now != then:
                raise RegionError(
                    f"{name} is {now!r}, but the region in `resolved` was chosen with {then!r}: for a new choice pass "
                    f"dataclasses.replace(config, {name}={now!r}, resolved=None)"
                )

    def _check_trainable(self, region: Collection[str], model: nn.Module) -> None:
        """Refuse what a delta cannot be put on, while nothing is wrapped yet."""
        tokens = token_modules(model, self)
        for name, module_name, module, parameter in walk_parameters(model):
            if name not in region:
                continue
            if not module_name:
                raise RegionError(
                    f"{name!r} belongs to the model itself, which PEFT cannot wrap: put it into a submodule, or leave "
                    "it out of target_modules and target_parameters"
                )
            if not is_plain(parameter, module) and not can_stand_beside(module):
                raise RegionError(
                    f"{name!r} of {type(module).__name__} is quantised, sharded or offloaded ({parameter.dtype}): "
                    "that takes a linear layer, a convolution, an embedding or a norm with the usual forward; load "
                    "the base in bfloat16 on one device, or leave the module out (exclude_modules)"
                )
            if module_name in tokens:
                raise RegionError(
                    f"{name!r} is in the region and in trainable_token_indices: train the embedding or some of its "
                    "rows, not both"
                )
        if tied := tied_names(model, region):
            name, others = next(iter(tied.items()))
            raise RegionError(
                f"{name!r} is tied to {others}: a delta on the one would be missed by the other. Leave it out of the "
                "region (exclude_modules, train_embeddings=False), or untie them by loading the model with "
                "tie_word_embeddings=False and copying the weight"
            )

    def _without_excluded(self, region: Region) -> Region:
        module_of = {name: name.rpartition(".")[0] for name in region}
        excluded = {module for module in set(module_of.values()) if is_excluded(self, module)}
        return Region({name: selection for name, selection in region.items() if module_of[name] not in excluded})

    @property
    def saved_torch_dtype(self) -> torch.dtype | None:
        """`save_dtype` as torch's own."""
        return None if self.save_dtype is None else getattr(torch, self.save_dtype)


def _all(values: Any, kind: type) -> bool:
    """Whether it is a list, or the like, of these alone."""
    return isinstance(values, Collection) and not isinstance(values, str) and all(isinstance(v, kind) for v in values)


def _plain(value: Any) -> Any:
    """A field as JSON gives it back: sets sorted, tuples as lists."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def _layers_digest(model: nn.Module) -> str:
    """Digest of the names and shapes inside the layers: the vocabulary and a task's head may differ."""
    tree, every = Tree(model), shapes_of(model)
    inside = {name: shape for name, shape in every.items() if tree.place(name.rpartition(".")[0])[1] is not None}
    named = sorted((inside or every).items())
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]
