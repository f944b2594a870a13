"""Altered adapters and exact differences, as whole folders: what merging or loading them gives, or why it is refused.

The oracle reads an altered adapter once more, slowly and by itself: what the file says, on the base's bits.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import traceback
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_isolate import CoFiTuneConfig, HalfFTConfig, next_round
from peft_isolate.checkpoints.adapter import Adapter, Alone
from peft_isolate.checkpoints.compress import compress, decompress
from peft_isolate.checkpoints.exact import FILE
from peft_isolate.checkpoints.extract import extract
from peft_isolate.checkpoints.memory import Checkpoint
from peft_isolate.checkpoints.merge import merge
from peft_isolate.deltas.layer import DeltaLayer
from peft_isolate.deltas.packed import unpack
from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.regions import base_parameters
from tests.checkpoints.alterations import Script, altered_tensors, altered_text, signed
from tests.checkpoints.folders import files, load, saved, tensors, trained
from tests.checkpoints.fuzzing import Target, pick, same, scratch, taken
from tests.given import GivenConfig
from tests.learn import filled
from tests.regions.test_codes import slow_decode

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


@functools.cache
def base() -> Path:
    """A base model's folder."""
    return saved(scratch() / "base", dtype=torch.bfloat16, num_key_value_heads=1, **SMALL)


@functools.cache
def model() -> torch.nn.Module:
    """The base, in memory: to be copied."""
    return load(base())


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    """The base's tensors."""
    return tensors(base())


@functools.cache
def adapters() -> list[Path]:
    """Sound ones: of every kind of selection, with a soft mask, with what is held, and packed."""
    torch.manual_seed(0)
    found = [
        trained(base(), GivenConfig(kind=kind), scratch() / kind)
        for kind in ("rows", "columns", "elements", "all_but", "whole")
    ]
    damped = CoFiTuneConfig(layer_range=(0, 1), modules="MHA+FFN", importance=_importance())
    found.append(trained(base(), damped, scratch() / "damped"))
    second = filled(get_peft_model(copy.deepcopy(model()), HalfFTConfig()))
    next_round(second)
    filled(second, seed=1).save_pretrained(scratch() / "held")
    found.append(scratch() / "held")
    for name, values in (("elements", "int8"), ("held", "bf16"), ("damped", "exact"), ("all_but", "fp16")):
        compress(scratch() / name, scratch() / f"{name}-{values}", values)
        found.append(scratch() / f"{name}-{values}")
    return found


def _importance() -> Any:
    from peft_isolate.methods.cofitune.importance import measure_importance
    from tests.models import tokens

    batch = {"input_ids": tokens(), "labels": tokens(seed=1)}
    return measure_importance(copy.deepcopy(model()).float(), [batch], progress=False)


@functools.cache
def exact() -> tuple[Path, Path]:
    """(a tuned checkpoint, its exact difference to the base)."""
    tuned = copy.deepcopy(model())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in list(tuned.parameters())[1:4]:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    folder = scratch() / "tuned"
    tuned.save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"more.weight": torch.randn(3, 4)}, path, {"format": "pt"})
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("of the tuned one\n" * 20)
    extract(base(), folder, scratch() / "exact", mode="exact")
    return folder, scratch() / "exact"


def altered_adapter(script: Script) -> tuple[Path, Path]:
    """(an altered adapter, the sound one that it was). A step in sixteen takes the numbers of another one."""
    sound = pick(script, adapters())
    folder = scratch() / "altered"
    folder.mkdir(exist_ok=True)
    config, numbers = json.loads((sound / CONFIG).read_text()), (sound / WEIGHTS).read_bytes()
    if script and script[0][1] % 16 == 5:
        numbers = (adapters()[script[0][2] % len(adapters())] / WEIGHTS).read_bytes()
        script = script[1:]
    in_config = not script or script[0][2] >> 20 & 3 != 0
    (folder / CONFIG).write_bytes(altered_text(config, script if in_config else ()))
    (folder / WEIGHTS).write_bytes(numbers if in_config else altered_tensors(numbers, script))
    return folder, sound


class _Deltas:
    """What an adapter's folder says, read by the book."""

    def __init__(self, folder: Path, sound: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        # Without a record the method draws its region again: the sound one's.
        self.record = config.get("resolved") or json.loads((sound / CONFIG).read_text())["resolved"]
        self.prefix = f"{config['peft_type'].lower()}_"
        self.found = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
        if config.get("packed") is not None:
            # A buffer that was altered is refused: these are the sound one's.
            packings = (alone := Alone(sound)).config.packings(alone.recorded())
            for parameter, packing in packings.items():
                stem = self.stem(parameter)
                content = unpack(self.found.pop(f"{stem}.packed"), packing)
                self.found |= {f"{stem}.{name}": tensor for name, tensor in content.items()}

    def stem(self, parameter: str) -> str:
        module, _, name = parameter.rpartition(".")
        return f"{module}.{self.prefix}{name}"

    def dense(self, parameter: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """(what is added to a parameter in fp32, where)."""
        total, support = torch.zeros(shape).flatten(), torch.zeros(shape, dtype=torch.bool).flatten()
        for part, name in (("region", "delta"), ("held", "held")):
            if (entry := self.record.get(part, {}).get(parameter)) is None:
                continue
            numbers = self.found[f"{self.stem(parameter)}.{name}"].flatten().float()
            at, units = self._positions(entry, shape, f"{self.stem(parameter)}.{name}_codes")
            if entry["kind"] == "all_but":
                numbers = numbers[at]
            mask = self.record.get("masks", {}).get(parameter)
            if part == "region" and mask and mask["damps"] == "update":
                importance = self.found[f"{self.stem(parameter)}.importance"].float()
                numbers = numbers * (1.0 - importance)[units[mask["axis"]]]
            total[at] += numbers
            support[at] = True
        return total.reshape(shape), support.reshape(shape)

    def _positions(self, entry: Any, shape: tuple[int, ...], codes: str) -> tuple[torch.Tensor, dict[str, Any]]:
        """Flat positions, and for each the number of its row and of its column among the selected ones."""
        columns = shape[-1]
        flat = torch.arange(torch.Size(shape).numel())
        if entry["kind"] in ("elements", "all_but"):
            width = int(entry["format"].removeprefix("gap"))
            at = torch.tensor(slow_decode(self.found[codes].numpy().tobytes(), width), dtype=torch.int64)
            return (at if entry["kind"] == "elements" else flat[~torch.isin(flat, at)]), {}
        row, column = flat // columns, flat % columns
        if entry["kind"] == "whole":
            return flat, {"rows": row, "columns": column}
        runs = [range(a + c * k, a + c * k + b) for a, b, c, n in entry["strides"] for k in range(n)]
        units = torch.tensor(sorted(unit for run in runs for unit in run), dtype=torch.int64)
        along = row if entry["kind"] == "rows" else column
        at = flat[torch.isin(along, units)]
        return at, {entry["kind"]: torch.searchsorted(units, along[at])}

    def merged(self) -> dict[str, torch.Tensor]:
        """What the base's tensors become."""
        found = dict(weights())
        for parameter in {**self.record.get("region", {}), **self.record.get("held", {})}:
            w0 = found[parameter]
            added, support = self.dense(parameter, tuple(w0.shape))
            found[parameter] = torch.where(support, (w0.float() + added).to(w0.dtype), w0)
        for key, tensor in self.found.items():
            if f".{self.prefix}" not in key:
                found[key] = tensor.to(found[key].dtype)
        return found


def _assert_merged(found: dict[str, torch.Tensor], folder: Path, sound: Path) -> None:
    with taken():
        wanted = _Deltas(folder, sound).merged()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert same(tensor, wanted[name]), f"{name!r} is not what the file says"


def _fresh() -> Path:
    """A folder for results, with nothing in it."""
    out = scratch() / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return out


def _assert_tidy(out: Path, refused: bool) -> None:
    """A refusal leaves nothing, also under hidden names; nothing lies anywhere else."""
    assert os.listdir(out) == ([] if refused else ["result"])
    for path in (Path("/tmp/beside"), scratch() / "beside", scratch().parent / "beside", out / "beside"):
        assert not path.exists(), f"{path} was written"


def _judge_adapter(script: Script) -> None:
    """Read without a merge: the deltas are what the file says, one by one."""
    folder, sound = altered_adapter(script)
    adapter = Adapter(folder)
    resolved = adapter.resolve(_meta())
    found = {name: adapter.delta(name).dense() for name in (*resolved.trained, *resolved.held)}
    with taken():
        said = _Deltas(folder, sound)
    for name, tensor in found.items():
        added, support = said.dense(name, tuple(weights()[name].shape))
        assert torch.equal(tensor.float(), added), f"{name!r} is not what the file says"
        assert not tensor[~support].any()


@functools.cache
def _meta() -> torch.nn.Module:
    return Checkpoint(base()).model


def _judge_merge(script: Script) -> None:
    """Merged: the base's bits outside the region, what the file says inside."""
    folder, sound = altered_adapter(script)
    out = _fresh()
    try:
        merge(base(), folder, out=out / "result")
    except IsolateError:
        _assert_tidy(out, refused=True)
        raise
    _assert_tidy(out, refused=False)
    _assert_merged(tensors(out / "result"), folder, sound)


def _judge_alone(script: Script) -> None:
    """Compressed or decompressed without the base: the result says what the file said."""
    folder, sound = altered_adapter(script)
    out = _fresh()
    try:
        packed = json.loads((folder / CONFIG).read_bytes()).get("packed") is not None
    except (ValueError, AttributeError, RecursionError):
        packed = False
    try:
        (decompress if packed else functools.partial(compress, values="exact"))(folder, out / "result")
    except IsolateError:
        _assert_tidy(out, refused=True)
        raise
    _assert_tidy(out, refused=False)
    with taken():
        if not packed:
            decompress(out / "result", out / "back")
        result = _Deltas(out / ("result" if packed else "back"), sound)
        said = _Deltas(folder, sound)
    places = {**said.record.get("held", {}), **said.record.get("region", {})}
    for name, entry in places.items():
        if torch.Size(entry["shape"]).numel() > 2**20:
            continue  # single elements of a tensor of any size: the twin builds it
        left, right = (deltas.dense(name, tuple(entry["shape"])) for deltas in (result, said))
        assert torch.equal(left[0], right[0])
        assert torch.equal(left[1], right[1])


# What stock loading raises by itself, before this library sees the file or after: safetensors' own error; json's, a
# ValueError; what PEFT's config makes of fields that are none (TypeError, ValueError, KeyError, AttributeError), its
# "Can't find", a ValueError. Not torch's RuntimeError for a size: by then some numbers would be loaded.
THEIRS = ("SafetensorError", "ValueError", "JSONDecodeError", "UnicodeDecodeError", "TypeError", "KeyError",
          "AttributeError", "RecursionError", "OSError", "HFValidationError")  # fmt: skip


def _judge_stock(script: Script) -> None:
    """`PeftModel.from_pretrained`: what the file says, or an error of ours, or of others; the base is whole."""
    folder, sound = altered_adapter(script)
    own = copy.deepcopy(model())
    try:
        loaded = PeftModel.from_pretrained(own, folder)
    except Exception as found:
        error = found
    else:
        error = None
    if error is not None:
        _assert_base(own)
        if isinstance(error, IsolateError):
            if json.loads((folder / CONFIG).read_text()).get("resolved"):
                assert not any(isinstance(module, DeltaLayer) for module in own.modules()), "half an adapter is left"
            raise error
        # What PEFT cannot read it finds out after it has made the adapter, whatever the method: it stays, at zero.
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        ours = [i for i, name in enumerate(frames) if "/peft_isolate/" in name]
        peft = [i for i, name in enumerate(frames) if "/peft/" in name]
        assert type(error).__name__ in THEIRS, repr(error)
        assert not ours or max(peft) > max(ours), f"{error!r} comes from this library: {frames[max(ours)]}"
        raise FormatError("refused by others") from error
    if not any(isinstance(module, DeltaLayer) for module in loaded.modules()):
        return  # the file says that it is another method's
    with taken():
        merged = loaded.merge_and_unload()
    _assert_merged({name: merged.get_parameter(name) for name in weights()}, folder, sound)


def _assert_base(own: torch.nn.Module) -> None:
    for name, parameter in base_parameters(own).items():
        assert same(parameter, weights()[name]), f"{name!r} of the base was changed"


def _judge_exact(script: Script) -> None:
    """An exact difference gives the tuned files to the byte; where its checksums were made right again, a folder."""
    tuned, sound = exact()
    folder = scratch() / "altered-exact"
    folder.mkdir(exist_ok=True)
    resigned = bool(script) and script[0][1] % 4 > 1
    data = altered_tensors((sound / FILE).read_bytes(), script, ["about"])
    (folder / FILE).write_bytes(signed(data) if resigned else data)
    out = _fresh()
    try:
        merge(base(), folder, out=out / "result")
    except IsolateError:
        _assert_tidy(out, refused=True)
        raise
    _assert_tidy(out, refused=False)
    if not resigned:
        assert files(out / "result") == files(tuned)


IN_FOLDERS = tuple(
    Target(judge.__name__.removeprefix("_judge_"), judge)
    for judge in (_judge_exact, _judge_adapter, _judge_merge, _judge_alone, _judge_stock)
)
