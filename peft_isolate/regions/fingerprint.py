"""The fingerprint of a base model: sixteen samples of every tensor, in a few KiB of text.

An adapter is a difference, and on another base than its own it gives nonsense without any error. So its config carries
samples of the base, and loading compares them.

**Format**, one byte a number where nothing else is said: base85 of zlib of: `1` (the version); the number of tensors
(uint32); for each tensor an identity (the first four bytes of SHA-256 of "<name> <shape>", such as
"lm_head.weight 64,32"); for each tensor its dtype (an index into `DTYPES`); then the samples of all tensors, little
endian, byte plane by byte plane for the tensors of each itemsize in turn, the smallest first: the bytes that hold
exponents lie together and compress. Tensors stand in the model's order, tied ones once.

Sample i of a tensor is its scalar at `number · numel >> 32`, where `number` is the i-th big-endian uint32 of SHA-512
of "<name> <shape>": a function of names and shapes alone, the same for any sharding, device or loading mode.

**What it can tell.** A tune that changed a share s of the scalars everywhere goes unnoticed with probability
`(1 - s)^(16 · tensors)`: for 0.1 % and the 291 tensors of Llama-2-7B that is 0.01. A change of few tensors, of few
scalars, or below the resolution of the coarser dtype of the two, may go unnoticed.
"""

from __future__ import annotations

import base64
import hashlib
import struct
import zlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch

from ..errors import BaseMismatchError, FormatError

SAMPLES = 16
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
VERSION = 1
# What a fingerprint can expand to, by its bytes: of a tensor it has at most 133, of which the identity's four never
# become fewer.
LARGEST_RATIO = 64


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The fingerprint of a model.

    Args:
        tensors: (name, tensor) in the model's order; names and shapes as in memory, floating dtypes.

    Returns:
        ASCII text: about 25 bytes a tensor in bf16 and fp16, 70 in fp32.
    """
    identities, dtypes, samples = [], [], []
    for name, tensor in tensors:
        if tensor.numel():
            identities.append(_identity(name, tensor))
            dtypes.append(DTYPES.index(tensor.dtype))
            samples.append(np.frombuffer(as_bytes(_samples(name, tensor)), np.uint8))
    planes = []
    for itemsize in (2, 4, 8):
        rows = [sample for sample, dtype in zip(samples, dtypes, strict=True) if DTYPES[dtype].itemsize == itemsize]
        if rows:
            planes.append(np.stack(rows).reshape(-1, itemsize).T.tobytes())
    head = struct.pack("<BI", VERSION, len(dtypes)) + b"".join(identities) + bytes(dtypes)
    return base64.b85encode(zlib.compress(head + b"".join(planes), 9)).decode("ascii")


def compare(recorded: str, tensors: Iterable[tuple[str, torch.Tensor]], remedy: str = "") -> int:
    """Compare a model with the fingerprint of another, in the coarser dtype of the two, tensor by tensor.

    Args:
        recorded: What `fingerprint` returned.
        tensors: As for `fingerprint`. What the other model did not have under this name and in this shape (another
            head, a longer vocabulary) is not compared.
        remedy: What else can be done, at the end of the message.

    Returns:
        Tensors compared.

    Raises:
        BaseMismatchError: Names the first tensor that differs, with both values.
        FormatError: `recorded` is no fingerprint.
    """
    known = _parse(recorded)
    compared = 0
    for name, tensor in tensors:
        theirs = known.get(_identity(name, tensor)) if tensor.numel() else None
        if theirs is None:
            continue
        ours = _samples(name, tensor)
        compared += 1
        if (differs := ~_agree(theirs, ours)).any():
            at = int(differs.nonzero()[0])
            raise BaseMismatchError(
                f"this is another base than the adapter's: {name!r} has {ours[at].item():.6g} where the adapter's "
                f"base has {theirs[at].item():.6g} ({int(differs.sum())} of {SAMPLES} samples differ). Load the base "
                f"the adapter was trained on{remedy}"
            )
    return compared


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, in the order of its positions; a view where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _agree(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """bool (16,): whether the samples may be roundings of the same numbers."""
    if theirs.dtype == ours.dtype:
        return (theirs == ours) | (theirs.isnan() & ours.isnan())
    a, b = theirs.double(), ours.double()
    if {theirs.dtype, ours.dtype} == {torch.bfloat16, torch.float16}:
        # Neither holds the other's numbers. Each is within half a unit of the true one: of bf16's last place, and
        # of fp16's smallest step; fp16 has nothing beyond its largest number.
        unit = torch.maximum(a.abs(), b.abs()) * 2.0**-8 + 2.0**-24
        return ((a - b).abs() <= unit) | (a.isnan() & b.isnan()) | (torch.maximum(a.abs(), b.abs()) >= 65504)
    coarser = theirs.dtype if theirs.dtype.itemsize < ours.dtype.itemsize else ours.dtype
    return _agree(theirs.to(coarser), ours.to(coarser))


def _samples(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """(16,) scalars of a tensor, on the CPU, in its dtype."""
    numbers = struct.unpack(">16I", hashlib.sha512(_named(name, tensor)).digest())
    positions = torch.tensor([number * tensor.numel() >> 32 for number in numbers], device=tensor.device)
    if tensor.is_contiguous():
        return tensor.detach().view(-1)[positions].cpu()
    # By coordinates: a view of any strides is sampled without a copy of it.
    return tensor.detach()[torch.unravel_index(positions, tensor.shape)].cpu()


def _named(name: str, tensor: torch.Tensor) -> bytes:
    return f"{name} {','.join(map(str, tensor.shape))}".encode()


def _identity(name: str, tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(_named(name, tensor)).digest()[:4]


def _parse(recorded: str) -> dict[bytes, torch.Tensor]:
    """{identity: the samples}."""
    try:
        inflate, written = zlib.decompressobj(), base64.b85decode(recorded)
        data = inflate.decompress(written, LARGEST_RATIO * len(written))
        version, n = struct.unpack_from("<BI", data)
        if version != VERSION or not inflate.eof:
            raise ValueError(f"its version is {version}")
        at = struct.calcsize("<BI")
        if 5 * n > len(data):
            raise ValueError(f"it states {n:,} tensors")
        identities = [data[at + 4 * i : at + 4 * i + 4] for i in range(n)]
        dtypes = [DTYPES[code] for code in data[at + 4 * n : at + 5 * n]]
        at += 5 * n
        found: dict[bytes, torch.Tensor] = {}
        for itemsize in (2, 4, 8):
            these = [i for i, dtype in enumerate(dtypes) if dtype.itemsize == itemsize]
            size = len(these) * SAMPLES * itemsize
            planes = np.frombuffer(data, np.uint8, size, at).reshape(itemsize, -1)
            rows = torch.from_numpy(planes.T.copy()).reshape(len(these), SAMPLES * itemsize)
            at += size
            found |= {identities[i]: row.view(dtypes[i]) for i, row in zip(these, rows, strict=True)}
        if at != len(data) or len(dtypes) != n:
            raise ValueError("its length is wrong")
        # Among tens of thousands of tensors two can have the same four bytes: neither is compared.
        times = Counter(identities)
        return {identity: samples for identity, samples in found.items() if times[identity] == 1}
    except (ValueError, TypeError, IndexError, struct.error, zlib.error) as error:
        raise FormatError(
            f"the adapter's fingerprint of its base is damaged ({error}): restore adapter_config.json from where it "
            "came"
        ) from error
