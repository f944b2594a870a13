"""A region as one safetensors file.

**Format `peft_isolate.region/2`.** The metadata have `format`, and `selections`, the JSON of `{parameter: described}`
in the region's order. Each is seen as a matrix: rows are all leading dimensions flattened, columns the last one.

- `{"kind": "whole", "shape"}`: every scalar. It has no tensor.
- `{"kind", "shape", "count", "format"}` with kind `rows`, `columns`, `elements` or `all_but`: there is one uint8
  tensor under the parameter's name, the gap code (see `regions.codes`) in that format of `count` indices below a size:
  row numbers below the number of rows, column numbers below that of columns, flat positions, or those of the holes,
  below that of scalars. They are some of these, neither none nor all: `0 < count < size`.

A reader MUST refuse what is otherwise, before it takes memory by `count`.

**Format `peft_isolate.region/1`**, which is read and no more written: `described` is `{"kind", "shape"}`, and the
tensor is the indices themselves, int64, sorted and unique.

Why so: a core of 70 million scalars is a file of 76 MB instead of 560, and whoever loads it need not decode it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import FormatError
from .codes import Codes, encode
from .files import read_tensors, write_whole
from .selection import KINDS, Kind, Selection, matrix_shape, whole_numbers
from .stored import BY_ELEMENTS, Place, StoredSelection, storable

FORMAT = "peft_isolate.region/2"
INDICES = "peft_isolate.region/1"


def write_places(path: str | os.PathLike[str], places: Mapping[str, Place]) -> None:
    """Write a region, whole or not at all.

    Args:
        path: The file. Missing folders are made.
        places: {parameter: its selection, by codes or not}.
    """
    described: dict[str, dict[str, Any]] = {}
    tensors = {}
    for name, place in places.items():
        described[name] = {"kind": place.kind, "shape": list(place.shape)}
        if place.kind != "whole":
            count, format, tensors[name] = _coded(place)
            described[name] |= {"count": count, "format": format}
    metadata = {"format": FORMAT, "selections": json.dumps(described)}
    write_whole(path, lambda beside: save_file(tensors, beside, metadata=metadata))


def read_places(path: str | os.PathLike[str]) -> dict[str, Place]:
    """Read what `write_places` wrote, in this version or an earlier one. Single elements stay codes, and are checked.

    Raises:
        IsolateError: There is no such file.
        FormatError: The file is truncated, altered, or no region.
    """
    with read_tensors(path, (FORMAT, INDICES), "region") as (file, metadata):
        names = set(file.keys())
        places: dict[str, Place] = {}
        described = json.loads(metadata["selections"], object_pairs_hook=_once)
        needed = {name for name, entry in described.items() if entry["kind"] != "whole"}
        for name, entry in described.items():
            kind, shape = entry["kind"], whole_numbers(entry["shape"])
            if kind not in KINDS:
                raise FormatError(f"{name!r} has the unknown kind {kind!r}")
            if kind == "whole":
                places[name] = Selection.whole(shape)
            elif name not in names:
                raise FormatError(f"the indices of {name!r} are missing")
            elif metadata["format"] == INDICES:
                places[name] = storable(getattr(Selection, kind)(shape, file.get_tensor(name)))
            else:
                # Cloned: safetensors' own is a view of the file, which may change under it.
                places[name] = _place(name, kind, shape, entry, file.get_tensor(name).clone())
        if surplus := sorted(names - needed):
            raise FormatError(f"it has a tensor {surplus[0]!r}, which is of no selection")
        if sum(math.prod(place.shape) for place in places.values()) >= 2**63:
            raise FormatError("it claims tensors of more scalars than any machine can count")
        return places


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which each reader would see the same: no key comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise FormatError(f"of the keys {[key for key, _ in pairs][:10]!r} one comes twice")
    return found


def _coded(place: Place) -> tuple[int, str, torch.Tensor]:
    """(number of indices, format of their code, the code) of a selection that is not whole."""
    place = storable(place)
    if isinstance(place, StoredSelection):
        # Cloned, like any tensor here: one selection may stand under several names, and safetensors takes none twice.
        return place.codes.count, place.codes.format, place.loaded().clone()
    code, format = encode(place.indices, _size(place.kind, place.shape))
    return place.indices.numel(), format, torch.from_numpy(code)


def _place(name: str, kind: Kind, shape: tuple[int, ...], entry: Mapping[str, Any], code: torch.Tensor) -> Place:
    """What a stranger's file says of a selection that is not whole."""
    codes = Codes.from_dict({"count": entry["count"], "code_bytes": code.numel(), "format": entry["format"]})
    size = _size(kind, shape)
    if not 0 < codes.count < size:
        raise FormatError(f"{codes.count:,} {kind} of {name!r}, of {size:,}, are not a part of them")
    # Rows and columns are decoded as positions in a vector of them all.
    by_elements = kind in BY_ELEMENTS
    stored = StoredSelection(kind if by_elements else "elements", shape if by_elements else (size,), codes, code)
    stored.check(code)
    if by_elements:
        return stored
    selection: Selection = getattr(Selection, kind)(shape, stored.decode(code))
    return selection


def _size(kind: Kind, shape: tuple[int, ...]) -> int:
    """How many indices of this kind there are: rows, columns or scalars."""
    n_rows, n_columns = matrix_shape(shape)
    return {"rows": n_rows, "columns": n_columns}.get(kind, math.prod(shape))
