"""One buffer for the weights that are composed to be used once.

On the CPU fresh memory costs more than the sum that is written into it: every page is cleared by the system first
(benchmarks/compose.py). The layers of all models therefore compose into the same buffer, one for each thread and
dtype, which is as large as the largest weight so far. It is given back after the last layer of a training step's
forward, and when the last of these layers goes. A GPU's allocator keeps what is freed, in the order of each stream,
and is left to it.

What lies in the buffer is valid until the same thread composes again: it is neither returned to anyone nor kept for
backward.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Scratch(threading.local):
    """What a layer holds on to for as long as it composes into the buffer."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, torch.Tensor] = {}

    def give_back(self) -> None:
        """Free the calling thread's buffers; the next that is needed is made anew."""
        self.buffers.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return shared, ()


_shared: weakref.ref[Scratch] | None = None


def shared() -> Scratch:
    """The one that there is, or a new one."""
    global _shared
    scratch = None if _shared is None else _shared()
    if scratch is None:
        scratch = Scratch()
        _shared = weakref.ref(scratch)
    return scratch


def scratch_like(tensor: torch.Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None):
    """Memory for a result that is used once: of a tensor's shape, strides and dtype, or contiguous of another shape.

    The shared buffer where the tensor is a plain one on the CPU, some layer holds the buffer, and nobody watches or
    keeps what is computed (tracers, selective checkpointing); else fresh memory.
    """
    dtype = dtype or tensor.dtype
    if shape is None and not tensor.is_contiguous():
        return torch.empty_like(tensor, dtype=dtype)
    scratch = None if _shared is None else _shared()
    plain = tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if scratch is None or not plain or is_in_torch_dispatch_mode():
        return tensor.new_empty(tensor.shape if shape is None else shape, dtype=dtype)
    numel = tensor.numel() if shape is None else math.prod(shape)
    buffer = scratch.buffers.get(dtype)
    if buffer is None or buffer.numel() < numel:
        scratch.buffers.pop(dtype, None)  # before the larger one is there
        with torch.inference_mode(False):
            buffer = torch.empty(numel, dtype=dtype, device="cpu")
        scratch.buffers[dtype] = buffer
    # The strides choose the kernel, also those of a single row, which say nothing about where its scalars are.
    return buffer[:numel].as_strided(tensor.shape, tensor.stride()) if shape is None else buffer[:numel].view(shape)
