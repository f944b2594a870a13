"""A saved adapter without a model: its config, its deltas one at a time, and what it carries beside them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from torch import nn

from ..deltas.base import compare_base
from ..deltas.config import DeltaConfig, Resolved
from ..deltas.delta import HELD, TRAINED, Delta, all_finite
from ..deltas.packed import Packing
from ..deltas.packed_delta import make_delta
from ..deltas.targets import saved_modules, token_modules, trained_beside
from ..errors import FormatError, IsolateError
from ..regions.region import Region
from .architecture import folder_of
from .memory import Checkpoint
from .shards import TensorFile

if TYPE_CHECKING:
    from .weights import Weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# No trained numbers shrink like this; what claims to is refused above some size, before it costs memory.
LARGEST_RATIO, HARMLESS = 2**12, 2**26
PREFIX = "base_model.model."
TOKENS = ".token_adapter.trainable_tokens_delta"


class Adapter:
    """An adapter as it lies on the disk. Nothing of it is trusted: what a model would refuse to load is refused here.

    Args:
        adapter: A folder or a Hub id.
        revision: Of the Hub.

    Attributes:
        name: As it was given.
        folder: Where it lies.
        config: Its config.
        n_bytes: Of the tensors' file.

    Raises:
        IsolateError: There is no adapter of this library.
        FormatError: A file is damaged.
    """

    def __init__(self, adapter: str | os.PathLike[str], revision: str | None = None) -> None:
        self.name = os.fspath(adapter)
        self.folder: Path = folder_of(adapter, revision)
        self.config: DeltaConfig = read_config(self.folder)
        path = self.folder / WEIGHTS
        if not path.is_file():
            raise IsolateError(f"{self.name!r} has no {WEIGHTS!r}: the download is incomplete, or it was never saved")
        self._file = TensorFile(path)
        self.n_bytes = path.stat().st_size
        self.keys: frozenset[str] = frozenset(self._file.keys())
        self._resolved: Resolved | None = None
        self._packings: dict[str, Packing] = {}

    @property
    def prefix(self) -> str:
        """What the names of its deltas begin with, after the module's."""
        return f"{str(getattr(self.config.peft_type, 'value', self.config.peft_type)).lower()}_"

    @property
    def class_name(self) -> str | None:
        """The class of transformers that it was trained on, where its config says so."""
        mapping: Any = self.config.auto_mapping
        if not isinstance(mapping, dict) or not str(mapping.get("parent_library", "")).startswith("transformers."):
            return None
        name = mapping.get("base_model_class")
        return name if isinstance(name, str) else None

    def resolve(self, model: nn.Module) -> Resolved:
        """Where it acts on a model of these names and shapes, which may be on the meta device.

        Raises:
            RegionError: It is another model's.
            FormatError: Its file does not hold its region, or holds what no adapter does.
        """
        if self.config.resolved is None:
            raise FormatError(
                f"the config of {self.name!r} has no region (`resolved` is empty): it was never saved with a model"
            )
        return self._hold(self.config.resolve(model))

    def _hold(self, resolved: Resolved) -> Resolved:
        """Take this as where it acts. Raises `FormatError` unless the file has deltas there, and nowhere else."""
        wanted = {f"{PREFIX}{self._stem(p)}" for p in (*resolved.trained, *resolved.held)}
        there = {key.rpartition(".")[0] for key in self.keys if f".{self.prefix}" in key}
        if different := sorted(wanted ^ there):
            raise FormatError(
                f"the file of {self.name!r} does not hold the region of its config: {different[0]!r} is only in the "
                f"{'config' if different[0] in wanted else 'file'}; the two are of different adapters, or one was "
                "altered"
            )
        self._resolved, self._packings = resolved, self.config.packings(resolved)
        return resolved

    def delta(self, parameter: str) -> Delta:
        """The delta on a parameter, with its numbers, on the CPU.

        Raises:
            FormatError: They are damaged, or not of its region.
        """
        assert self._resolved is not None, "resolve() comes first"
        trained, held, masks = self._resolved
        of_parameter = masks.get(parameter), self._packings.get(parameter)
        # Its placeholders take no memory there: the numbers are in the file.
        like = torch.empty(0, dtype=torch.float32, device="meta")
        delta = make_delta(trained.get(parameter), held.get(parameter), like, True, *of_parameter)
        stem = f"{PREFIX}{self._stem(parameter)}."
        wanted = {**dict(delta.named_parameters()), **delta.state}
        there = {key.removeprefix(stem) for key in self.keys if key.startswith(stem)}
        if different := sorted(there ^ wanted.keys()):
            raise FormatError(
                f"the file of {self.name!r} {'has' if different[0] in there else 'lacks'} {stem + different[0]!r}, "
                f"which its config does {'not name' if different[0] in there else 'name'}: one of the two was altered"
            )
        found = {}
        for name, placeholder in wanted.items():
            shape = self._file.entries[stem + name].shape
            if shape != tuple(placeholder.shape):
                raise FormatError(
                    f"{stem + name!r} has shape {shape} in the file of {self.name!r} and {tuple(placeholder.shape)} "
                    "by its config: one of the two was altered"
                )
            found[name] = self._file.get_tensor(stem + name)
        delta.check_state({name: found[name] for name in delta.state})
        for name, tensor in found.items():
            if name in delta.state:
                delta.register_buffer(name, tensor)
            elif not tensor.is_floating_point():
                raise FormatError(f"{stem + name!r} of {self.name!r} holds {tensor.dtype}, no numbers of a delta")
            else:
                setattr(delta, name, nn.Parameter(tensor, requires_grad=False))
        return delta

    def let_go(self) -> None:
        """Hold no mapping of the file any longer, until it is read again."""
        self._file.let_go()

    def learn_positions(self) -> None:
        """Let its config know which single elements it means: they stand in the file."""
        assert self._resolved is not None, "resolve() comes first"
        regions = []
        for part, places in ((TRAINED, self._resolved.trained), (HELD, self._resolved.held)):
            regions.append(Region({name: self.delta(name).selection(part) for name in places}).packed())
        self.config.learn_positions(*regions)

    def beside(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """{parameter: its numbers} of what was trained and saved whole: modules_to_save, and embeddings."""
        found = {}
        for key in sorted(self.keys):
            if f".{self.prefix}" in key or key.endswith(TOKENS):
                continue
            tensor = self._file.get_tensor(key)
            if tensor.is_floating_point() and not all_finite(tensor):
                raise FormatError(f"{key!r} of {self.name!r} holds NaN or infinity: the training diverged")
            found[key.removeprefix(PREFIX)] = tensor
        modules = saved_modules(self.config)
        for name in found:
            module = name.rpartition(".")[0]
            if any(f".{end}." in f".{module}." for end in modules) or module.endswith(("embed_tokens", "lm_head")):
                continue
            if module not in trained_beside(model, self.config):
                raise FormatError(
                    f"the file of {self.name!r} holds {name!r}, a weight of the base, which it would overwrite: no "
                    "adapter of this library does; get it again from where it came"
                )
        return found

    def tokens(self, model: nn.Module) -> dict[str, tuple[list[int], torch.Tensor]]:
        """{embedding's parameter: (rows, what stands in them)} of `trainable_token_indices`."""
        found = {}
        for module, _ in token_modules(model, self.config).items():
            key = f"{PREFIX}{module}{TOKENS}"
            if key not in self.keys:
                raise FormatError(f"the file of {self.name!r} lacks {key!r}, which its config names")
            indices: Any = self.config.trainable_token_indices
            if isinstance(indices, dict):
                indices = next(rows for end, rows in indices.items() if f".{module}".endswith(f".{end}"))
            found[f"{module}.weight"] = (list(indices), self._file.get_tensor(key))
        return found

    def check_base(self, base: Checkpoint | Weights) -> int | None:
        """Compare a base with the fingerprint of the base that the adapter was trained on.

        Returns:
            Tensors compared; None where the adapter carries no fingerprint.

        Raises:
            BaseMismatchError: It is another one.
        """
        recorded = (self.config.resolved or {}).get("base")
        if recorded is None:
            return None
        beside = trained_beside(base.model, self.config)
        names = (name for name in base if name.rpartition(".")[0] not in beside)
        return compare_base(recorded, ((name, base.read(name)) for name in names))

    def _stem(self, parameter: str) -> str:
        module, _, name = parameter.rpartition(".")
        return f"{module}.{self.prefix}{name}"


class Alone(Adapter):
    """An adapter that is read without its base, or a model of its shapes: its claims are held against its size."""

    def recorded(self) -> Resolved:
        """Where it acts. Raises as `Adapter.resolve` does."""
        record = self.config.resolved
        claims = [] if not isinstance(record, dict) else [record.get(part) for part in ("region", "held")]
        claimed = sum(_claimed(entry) for part in claims if isinstance(part, dict) for entry in part.values())
        if claimed > max(HARMLESS, LARGEST_RATIO * self.n_bytes):
            raise FormatError(
                f"the config of {self.name!r} claims {claimed:,} scalars, its tensors' file has {self.n_bytes:,} "
                "bytes: no trained adapter is like that, the two were altered or are of different adapters"
            )
        resolved = self._hold(self.config.recorded())
        self.parameters = list(dict.fromkeys([*resolved.trained, *resolved.held]))
        return resolved

    def key(self, parameter: str, name: str) -> str:
        """Of a delta's tensor in the file."""
        return f"{PREFIX}{self._stem(parameter)}.{name}"

    def carried(self) -> dict[str, torch.Tensor]:
        """{key: tensor} of what is no delta."""
        return {key: self._file.get_tensor(key) for key in sorted(self.keys) if f".{self.prefix}" not in key}


def read_config(folder: Path) -> DeltaConfig:
    """The config of a saved adapter.

    Raises:
        IsolateError: It is no adapter, or another method's.
        FormatError: The file was altered.
    """
    config = any_config(folder)
    if not isinstance(config, DeltaConfig):
        raise IsolateError(
            f"{str(folder)!r} is an adapter of {type(config).__name__}, no difference on a region: merge it with "
            "PEFT's merge_and_unload()"
        )
    return config


def any_config(folder: Path) -> PeftConfig:
    """The config of a saved adapter, of this library or another. Raises as `read_config` does."""
    path = folder / CONFIG
    if not path.is_file():
        what = "has no " + CONFIG
        if (folder / "config.json").is_file():
            what += ", it is a model; the base comes first, then the adapter"
        elif (folder / "exact_delta.safetensors").is_file():
            what += ", it is an exact difference, which merge, verify, inspect and export take"
        raise IsolateError(f"{str(folder)!r} is no adapter: it {what}")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except IsolateError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError) as error:
        raise FormatError(f"{str(path)!r} makes no config: {type(error).__name__}: {error}") from error


def _claimed(entry: Any) -> int:
    """Scalars or units that a description in a stranger's config would be expanded to; what is none claims nothing."""
    try:
        shape = [int(size) for size in entry["shape"]]
        columns, rows = (max(1, shape[-1]) if shape else 1), max(1, math.prod(shape[:-1]))
        if entry["kind"] == "elements":
            return max(0, int(entry["count"]))
        if entry["kind"] in ("rows", "columns"):
            units = sum(int(length) * int(count) for _, length, _, count in entry["strides"])
            return max(0, units) * (columns if entry["kind"] == "rows" else rows)
        return rows * columns
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0
