"""The fingerprint of a base: what it tells apart, what it lets pass, how large it is."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_isolate.errors import BaseMismatchError, FormatError
from peft_isolate.regions import base_parameters
from peft_isolate.regions.fingerprint import SAMPLES, _agree, _identity, compare, fingerprint
from tests.models import tiny

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(model) -> list[tuple[str, torch.Tensor]]:
    return list(base_parameters(model).items())


def slow_samples(name: str, tensor: torch.Tensor) -> list[float]:
    """The samples as the format's description says, on a flat copy."""
    key = f"{name} {','.join(str(size) for size in tensor.shape)}".encode()
    numbers = struct.unpack(">16I", hashlib.sha512(key).digest())
    flat = tensor.detach().flatten().tolist()
    return [flat[number * len(flat) // 2**32] for number in numbers]


@pytest.mark.parametrize("loaded", DTYPES)
@pytest.mark.parametrize("recorded", DTYPES)
def test_the_same_base_in_any_dtype_passes_and_another_does_not(recorded, loaded):
    mine = fingerprint(tensors(tiny().to(recorded)))
    assert compare(mine, tensors(tiny().to(loaded))) == len(tensors(tiny()))
    with pytest.raises(BaseMismatchError, match=r"'model.embed_tokens.weight' has .* where the adapter's base has"):
        compare(mine, tensors(tiny(seed=1).to(loaded)))


def test_one_tensor_that_differs_is_named():
    model = tiny()
    mine = fingerprint(tensors(model))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
        model.model.layers[2].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(BaseMismatchError, match=r"'model.layers.1.mlp.up_proj.weight'.*16 of 16 samples"):
        compare(mine, tensors(model))


def test_the_samples_are_those_of_the_format():
    """What a reader in another language would compute: only these positions count."""
    tensor = torch.randn(7, 11)
    mine = fingerprint([("a.weight", tensor)])
    assert len(slow_samples("a.weight", tensor)) == SAMPLES
    other = torch.zeros_like(tensor)
    flat, known = tensor.flatten().tolist(), slow_samples("a.weight", tensor)
    for at, value in enumerate(flat):
        other.view(-1)[at] = value if value in known else 99.0
    assert compare(mine, [("a.weight", other)]) == 1
    other.view(-1)[flat.index(known[5])] += 1
    with pytest.raises(BaseMismatchError):
        compare(mine, [("a.weight", other)])


@pytest.mark.parametrize("share", [0.001, 0.01])
def test_how_often_a_sparse_change_goes_unnoticed(share):
    """(1 - s)^(16 · tensors): a change of 0.1 % everywhere in 291 tensors is missed once in a hundred times."""
    generator = torch.Generator().manual_seed(0)
    base = [(f"layer.{i}.weight", torch.randn(64, 64, generator=generator)) for i in range(291)]
    mine = fingerprint(base)
    missed = 0
    runs = 200
    for _ in range(runs):
        for _, tensor in base:
            changed = torch.rand(tensor.shape, generator=generator) < share
            tensor[changed] += 1.0
        try:
            compare(mine, base)
            missed += 1
        except BaseMismatchError:
            pass
        mine = fingerprint(base)
    expected = (1 - share) ** (SAMPLES * 291)  # 0.0095 and 5e-21
    assert missed <= runs * expected * 3 + 2


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-65000, 65000, width=32), min_size=1, max_size=16))
def test_roundings_of_the_same_numbers_agree(numbers):
    """Whatever two dtypes a base was rounded to, one of them fp32 or not: subnormal numbers of fp16 too."""
    exact = torch.tensor(numbers)
    for a in DTYPES:
        for b in DTYPES:
            assert _agree(exact.to(a), exact.to(b)).all(), (a, b)


@pytest.mark.parametrize(("theirs", "ours"), [(torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)])
def test_numbers_two_steps_apart_do_not_agree(theirs, ours):
    number = torch.tensor([0.02])
    assert not _agree(number.to(theirs), (number * (1 + 2**-6)).to(ours)).any()


def test_what_the_other_model_lacks_is_not_compared():
    """Another head, a longer vocabulary: names or shapes that only one of the two has."""
    mine = fingerprint(tensors(tiny()))
    longer = dict(tensors(tiny()))
    longer["lm_head.weight"] = torch.randn(80, 32)
    longer["score.weight"] = torch.randn(2, 32)
    assert compare(mine, longer.items()) == len(tensors(tiny())) - 1


def test_any_strides_and_shapes():
    scalar, empty, transposed = torch.tensor(3.0), torch.zeros(0, 4), torch.randn(5, 6, 7).permute(2, 0, 1)
    mine = fingerprint([("s", scalar), ("e", empty), ("t", transposed)])
    assert compare(mine, [("s", scalar), ("e", empty), ("t", transposed.contiguous())]) == 2


def test_its_size_is_a_few_kib():
    """The 291 tensors of Llama-2-7B; fp32 samples are twice as long, and their last bytes do not compress."""
    generator = torch.Generator().manual_seed(0)
    base = [(f"model.layers.{i}.weight", torch.randn(32, 32, generator=generator) * 0.02) for i in range(291)]
    assert len(fingerprint([(name, tensor.bfloat16()) for name, tensor in base])) <= 11 * 1024
    assert len(fingerprint(base)) <= 23 * 1024


@pytest.mark.parametrize("damage", ["", "x", "0" * 40, None, "cut", "flip"])
def test_a_damaged_fingerprint_is_an_error(damage):
    mine = fingerprint(tensors(tiny()))
    damaged = {"cut": mine[:-20], "flip": mine[:30] + ("a" if mine[30] != "a" else "b") + mine[31:]}.get(
        damage, damage
    )
    with pytest.raises(FormatError, match="fingerprint of its base is damaged"):
        compare(damaged, tensors(tiny()))


def test_two_tensors_of_one_identity_are_not_compared():
    """These two, of DeepSeek-V3, have the same first four bytes: the right base was refused."""
    pair = ("model.layers.20.mlp.experts.231.gate_proj.weight", "model.layers.28.mlp.experts.187.up_proj.weight")
    base = [(name, torch.full((1,), value).expand(2048, 7168)) for name, value in zip(pair, (1.0, 2.0), strict=True)]
    assert _identity(*base[0]) == _identity(*base[1])
    third = ("x", torch.ones(3))
    recorded = fingerprint([*base, third])
    assert compare(recorded, [*base, third]) == 1
    with pytest.raises(BaseMismatchError, match="'x' has 0 where"):
        compare(recorded, [*base, ("x", torch.zeros(3))])
