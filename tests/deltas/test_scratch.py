"""The shared buffer: one for all layers, never seen by anyone, and gone with them."""

from __future__ import annotations

import copy
import gc
import io
import threading

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_isolate import HalfFTConfig
from peft_isolate.deltas import scratch as module
from peft_isolate.deltas.adapters import layers_of
from peft_isolate.deltas.scratch import scratch_like, shared
from tests.models import tiny


@pytest.fixture(autouse=True)
def no_layers(monkeypatch):
    """Whatever models other tests have left."""
    monkeypatch.setattr(module, "_shared", None)


def test_one_buffer_as_large_as_the_largest_weight():
    held = shared()
    large, small = scratch_like(torch.empty(5, 7)), scratch_like(torch.empty(3, 2))
    assert (large.shape, small.shape) == ((5, 7), (3, 2))
    assert small.data_ptr() == large.data_ptr()
    assert scratch_like(torch.empty(5, 8)).numel() == 40
    assert list(held.buffers) == [torch.float32]
    assert scratch_like(torch.empty(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert scratch_like(torch.empty(2), (4, 4), torch.float64).shape == (4, 4)
    assert {dtype: buffer.numel() for dtype, buffer in held.buffers.items()} == {
        torch.float32: 40, torch.bfloat16: 2, torch.float64: 16,
    }  # fmt: skip


def test_it_goes_with_the_last_layer():
    """Nobody wants the largest weight's bytes back only when the process ends."""
    model = get_peft_model(tiny("llama"), HalfFTConfig())
    twin = copy.deepcopy(model)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    held = shared()
    assert all(
        m._scratch is held for m in (*model.modules(), *twin.modules(), *loaded.modules()) if hasattr(m, "_scratch")
    )
    del held
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert module._shared().buffers
    del model, loaded
    gc.collect()
    assert module._shared() is not None
    del twin
    gc.collect()
    assert module._shared() is None


def test_it_is_given_back_before_the_loss():
    """Where the memory of a training step peaks; backward makes it anew, and generating keeps it."""
    model, held = get_peft_model(tiny("llama"), HalfFTConfig()), shared()
    tokens = torch.tensor([[1, 2, 3]])
    linear = [layer for layer in layers_of(model).values() if layer.is_plain_linear]
    assert [layer.is_last for layer in linear][-2:] == [False, True]
    loss = model(input_ids=tokens, labels=tokens).loss
    assert not held.buffers
    loss.backward()
    assert held.buffers
    model.add_adapter("more", HalfFTConfig(seed=1))
    assert sum(layer.is_last for layer in layers_of(model).values()) == 1
    with torch.no_grad():
        model(input_ids=tokens)
    assert held.buffers


def test_without_layers_or_off_the_cpu_memory_is_fresh():
    assert scratch_like(w := torch.empty(3)).data_ptr() != scratch_like(w).data_ptr()
    held = shared()
    assert scratch_like(torch.empty(3, device="meta")).is_meta
    assert type(scratch_like(Subclass(torch.empty(3)))) is Subclass
    assert scratch_like(turned := torch.empty(3, 4).T).stride() == turned.stride()
    assert not held.buffers


class Subclass(torch.Tensor):
    """Such as what a tracer puts in a tensor's place."""


def test_a_tracer_leaves_nothing_in_it():
    from torch._subclasses.fake_tensor import FakeTensorMode

    held = shared()
    with FakeTensorMode():
        scratch_like(torch.empty(3))
    real = torch.empty(4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        scratch_like(real)
    assert not held.buffers
    assert type(scratch_like(real)) is torch.Tensor


def test_inference_mode_leaves_a_buffer_that_training_can_write_to():
    held = shared()
    with torch.inference_mode():
        scratch_like(torch.empty(3)).fill_(1.0)
    assert not held.buffers[torch.float32].is_inference()
    scratch_like(torch.empty(3)).fill_(2.0)


def test_each_thread_has_its_own():
    """Two models that run at once would write over each other's weights."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64)) for _ in range(2)]
    models = [get_peft_model(layer, HalfFTConfig(target_modules=["0"], init_weights=False)) for layer in layers]
    x = torch.randn(8, 64)
    alone = [model(x) for model in models]
    wrong = []

    def run(model, expected):
        for _ in range(200):
            if not torch.equal(model(x), expected):
                wrong.append(model)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(models, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    held, pointers = shared(), []
    other = threading.Thread(target=lambda: pointers.append(scratch_like(torch.empty(2)).data_ptr()))
    other.start()
    other.join()
    assert pointers != [scratch_like(torch.empty(2)).data_ptr()]
    assert held.buffers


def test_nothing_of_it_is_kept_for_backward():
    """Two layers in a row compose into the same buffer, and the first one's gradient is still right."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model = get_peft_model(
        copy.deepcopy(base), HalfFTConfig(target_modules=["0", "2"], fraction=1.0, init_weights=False)
    )
    x = torch.randn(4, 16)
    model(x).square().sum().backward()
    plain = copy.deepcopy(model).merge_and_unload()
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    plain(x).square().sum().backward()
    for name in ("0", "2"):
        found = model.base_model.model[int(name)].deltas("weight")["default"].delta.grad
        assert torch.equal(found, plain[int(name)].weight.grad)
