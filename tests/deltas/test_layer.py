"""One wrapped module: several adapters, merge and unmerge, scales, hooks, modules of any type."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_isolate.deltas import DeltaLayer
from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.regions import Selection
from peft_isolate.regions.selection import KINDS
from peft_isolate.regions.stored import StoredSelection
from tests.compare import adapter, bits
from tests.given import GivenConfig
from tests.learn import learn
from tests.models import tiny, tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def wrap(base: nn.Module, **adapters: dict[str, Selection]) -> DeltaLayer:
    """A layer with random deltas: `wrap(nn.Linear(2, 3), a={"weight": …}, b={…})`; all adapters are active."""
    base.requires_grad_(False)
    layer = DeltaLayer(base, "halfft_")
    for name, selections in adapters.items():
        layer.update_layer(name, selections)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "halfft_" in name:
                parameter.normal_(std=0.1)
    layer.set_adapter(list(adapters))
    return layer


def linear_with_all_kinds(dtype: torch.dtype = torch.float32) -> DeltaLayer:
    base = nn.Linear(6, 8).to(dtype)
    return wrap(
        base,
        whole={"weight": Selection.whole((8, 6)), "bias": Selection.whole((8,))},
        rows={"weight": Selection.rows((8, 6), [1, 2, 5])},
        columns={"weight": Selection.columns((8, 6), [0, 4]), "bias": Selection.columns((8,), [7])},
        elements={"weight": Selection.elements((8, 6), [0, 7, 13, 47]), "bias": Selection.elements((8,), [2])},
        all_but={"weight": Selection.all_but((8, 6), [0, 13, 30])},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "active",
    [*([kind] for kind in KINDS), ["rows", "columns"], ["columns", "whole", "rows"], ["elements", "all_but", "rows"]],
)
def test_merged_is_adapted_and_unmerged_is_the_base_bit_for_bit(dtype, active):
    """Promise 2, five times over, for every combination of overlapping supports."""
    layer = linear_with_all_kinds(dtype)
    x = torch.randn(5, 6, dtype=dtype)
    weight, bias = bits(layer.base_layer.weight), bits(layer.base_layer.bias)
    layer.set_adapter(active)
    adapted = layer(x)
    for safe in (False, True, False, True, False):
        layer.merge(safe_merge=safe)
        assert torch.equal(layer(x), adapted)
        assert sorted(layer.merged_adapters) == sorted(active)
        layer.unmerge()
        assert torch.equal(bits(layer.base_layer.weight), weight)
        assert torch.equal(bits(layer.base_layer.bias), bias)
        assert torch.equal(layer(x), adapted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_does_not_matter(dtype):
    """Adapters are summed in the order they were added: whatever the active list says, and however they are merged."""
    layer = linear_with_all_kinds(dtype)
    x = torch.randn(5, 6, dtype=dtype)
    outputs = []
    for order in (list(KINDS), list(KINDS)[::-1], ["rows", "all_but", "whole", "elements", "columns"]):
        layer.set_adapter(order)
        outputs.append(layer(x))
        layer.merge(adapter_names=order[:1])
        with pytest.warns(UserWarning, match="additionally merging"):
            layer.merge(adapter_names=order)  # recomposed from W0, not rounded one after the other
        outputs.append(layer(x))
        layer.unmerge()
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_rounding_one_after_the_other_would_differ():
    """The control of the test above: it can fail."""
    layer = linear_with_all_kinds(torch.bfloat16)
    w0 = layer.base_layer.weight.clone()
    composed, one_by_one = w0.clone(), w0.clone()
    layer.merge()
    composed.copy_(layer.base_layer.weight)
    layer.unmerge()
    for name in KINDS:
        layer.merge(adapter_names=[name])
        one_by_one += layer.base_layer.weight - w0
        layer.unmerge()
    assert not torch.equal(composed, one_by_one)


def test_disabled_is_the_base_also_while_merged():
    layer = linear_with_all_kinds()
    x = torch.randn(5, 6)
    expected = copy.deepcopy(layer.base_layer)(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    layer.enable_adapters(True)
    assert not torch.equal(layer(x), expected)


def test_safe_merge_refuses_nan_and_changes_nothing():
    """The weight is sound and comes first, the bias is not: neither may be written."""
    layer = linear_with_all_kinds()
    before = bits(layer.base_layer.weight)
    with torch.no_grad():
        layer.deltas("bias")["whole"].delta[3] = float("nan")
    with pytest.raises(IsolateError, match=r"'bias' .* NaN or infinite.*nothing was merged"):
        layer.merge(safe_merge=True)
    assert torch.equal(bits(layer.base_layer.weight), before)
    assert not layer.merged


def test_scales_are_exact_at_both_ends():
    """α = 0 leaves the term out and α = 1 multiplies nothing, adapter by adapter."""
    layer = linear_with_all_kinds(torch.bfloat16)
    x = torch.randn(5, 6, dtype=torch.bfloat16)
    layer.set_adapter(["rows", "columns"])
    both = layer(x)
    layer.set_adapter(["rows"])
    rows_only = layer(x)
    layer.set_adapter(["rows", "columns"])
    layer.set_scale("columns", 0.0)
    assert torch.equal(layer(x), rows_only)
    layer.scale_layer(0.5)
    assert layer.scaling == {"whole": 1.0, "rows": 0.5, "columns": 0.0, "elements": 1.0, "all_but": 1.0}
    layer.unscale_layer(0.5)
    assert torch.equal(layer(x), rows_only)
    layer.unscale_layer()
    assert torch.equal(layer(x), both)
    layer.set_scale("rows", 0.25)
    quarter = layer(x)
    layer.merge()
    assert torch.equal(layer(x), quarter)
    with pytest.raises(IsolateError, match=r"0\.5 while the adapter is merged.*unmerge_adapter"):
        layer.set_scale("rows", 0.5)
    layer.unmerge()
    with pytest.raises(IsolateError, match="finite number, got nan"):
        layer.set_scale("rows", float("nan"))


def test_delete_forgets_everything_of_an_adapter():
    layer = linear_with_all_kinds()
    layer.delete_adapter("whole")
    assert set(layer.scaling) == {*KINDS} - {"whole"}
    assert not any(".whole." in name for name, _ in layer.named_parameters())
    assert layer.active_adapters == list(KINDS)[1:]


class Experts(nn.Module):
    """Two 3-D parameters and no `weight`, as fused experts have."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 3, 4))
        self.down = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x, expert=0):
        return x @ self.up[expert] @ self.down[expert]


class Doubled(nn.Linear):
    """A subclass with a forward of its own, like the scaled embeddings and projections of some models."""

    def forward(self, x):
        return 2 * super().forward(x)


MODULES = {
    "linear": (lambda: nn.Linear(6, 8), torch.randn(4, 6), ["weight", "bias"]),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), torch.randn(4, 6), ["weight"]),
    "bias alone": (lambda: nn.Linear(6, 8), torch.randn(4, 6), ["bias"]),
    "conv1d": (lambda: Conv1D(8, 6), torch.randn(2, 4, 6), ["weight", "bias"]),
    "subclass": (lambda: Doubled(6, 8), torch.randn(4, 6), ["weight", "bias"]),
    "embedding": (lambda: nn.Embedding(10, 6, padding_idx=0), torch.tensor([[1, 2, 0, 9]]), ["weight"]),
    "layer norm": (lambda: nn.LayerNorm(6), torch.randn(4, 6), ["weight", "bias"]),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3), torch.randn(1, 3, 6, 6), ["weight", "bias"]),
    "experts": (Experts, torch.randn(4, 3), ["up", "down"]),
}


def every_other(kind: str, shape: tuple[int, ...]) -> Selection:
    """All of a parameter, or every other row, column or scalar; a vector is one row: there, columns for rows."""
    rows, columns = Selection.whole(shape).matrix_shape
    if kind in ("elements", "all_but"):
        return getattr(Selection, kind)(shape, range(0, rows * columns, 2))
    if kind == "whole":
        return Selection.whole(shape)
    if kind == "rows" and rows > 1:
        return Selection.rows(shape, range(0, rows, 2))
    return Selection.columns(shape, range(0, columns, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_modules_of_any_type(name, dtype, kind):
    """Adapted = merged, base restored, gradients equal to training the module's own parameters."""
    make, x, parameters = MODULES[name]
    base = make().to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    twin = copy.deepcopy(base)
    before = {key: bits(value) for key, value in base.state_dict().items()}
    layer = wrap(base, a={key: every_other(kind, getattr(base, key).shape) for key in parameters})

    adapted = layer(x)
    adapted.float().square().sum().backward()
    layer.merge()
    assert torch.equal(layer(x), adapted)
    merged = {key: value.clone() for key, value in base.state_dict().items()}
    layer.unmerge()
    assert all(torch.equal(bits(value), before[key]) for key, value in base.state_dict().items())

    twin.load_state_dict(merged)
    twin(x).float().square().sum().backward()
    for key in parameters:
        delta = layer.deltas(key)["a"]
        mask = delta.selection().mask()
        ours = delta.delta.grad[mask] if kind == "all_but" else delta.delta.grad.flatten()
        torch.testing.assert_close(ours.float(), getattr(twin, key).grad[mask].float(), rtol=1e-5, atol=1e-5)
        if kind == "all_but":
            assert not delta.delta.grad[~mask].any(), "a hole got a gradient"


def test_hooks_of_the_base_layer_still_run():
    """A hook on the wrapped layer sees and may change what it did before."""
    layer = wrap(nn.Linear(6, 8), a={"weight": Selection.whole((8, 6))})
    x = torch.randn(4, 6)
    expected = layer(x)
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(layer(x), expected + 1)


def test_keyword_arguments_reach_the_base_layer():
    layer = wrap(Experts(), a={"up": Selection.whole((2, 3, 4))})
    x = torch.randn(4, 3)
    assert torch.equal(layer(x, expert=1), layer(x, 1))
    assert not torch.equal(layer(x, expert=1), layer(x, expert=0))


def test_repr_says_what_is_there():
    layer = linear_with_all_kinds()
    shown = repr(layer)
    assert "path=compose" in shown
    assert "α" not in shown
    layer.set_scale("rows", 0.5)
    assert "α={'rows': 0.5}" in repr(layer)
    assert "adapters=['whole', 'rows', 'columns', 'elements', 'all_but']" in shown
    assert "3 rows of (8, 6)" in shown


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(reentrant):
    layer = wrap(nn.Linear(6, 6), a={"weight": Selection.rows((6, 6), [0, 3, 4]), "bias": Selection.whole((6,))})
    x = torch.randn(3, 6, requires_grad=True)

    def gradients(run):
        layer.zero_grad()
        x.grad = None
        run().square().sum().backward()
        return [x.grad.clone(), *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]

    plain = gradients(lambda: layer(x))
    again = gradients(lambda: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def held_and_trained(dtype: torch.dtype = torch.float32) -> DeltaLayer:
    """All but three scalars learn, and one of the three keeps what an earlier round left."""
    layer = DeltaLayer(nn.Linear(6, 8).to(dtype).requires_grad_(False), "halfft_")
    shape = (8, 6)
    trained = {"weight": Selection.all_but(shape, [0, 13, 30])}
    layer.update_layer("a", trained, {"weight": Selection.elements(shape, [13]), "bias": Selection.whole((8,))})
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "halfft_" in name:
                parameter.normal_(std=0.1)
    layer.set_adapter(["a"])
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hole_is_held_or_w0(dtype):
    """Whatever the optimizer wrote there: a hole contributes what is held, and nothing else."""
    layer = held_and_trained(dtype)
    weight = layer.weight.detach()
    w0 = layer.base_layer.weight
    delta = layer.deltas("weight")["a"]
    assert torch.equal(bits(weight.flatten()[[0, 30]]), bits(w0.flatten()[[0, 30]]))
    expected = (w0.flatten()[13].float() + delta.held[0]).to(dtype)
    assert weight.flatten()[13] == expected != w0.flatten()[13]
    assert weight.flatten()[1] == (w0.flatten()[1].float() + delta.delta.flatten()[1]).to(dtype)
    # Nor does a hole overwrite what another adapter has there.
    layer.update_layer("b", {"weight": Selection.elements((8, 6), [0, 5])})
    with torch.no_grad():
        layer.deltas("weight")["b"].delta.fill_(0.5)
    layer.set_adapter(["a", "b"])
    assert layer.weight.flatten()[0] == (w0.flatten()[0].float() + 0.5).to(dtype)


def test_held_stays_frozen_wherever_peft_thaws():
    """set_adapter, set_requires_grad, enable, disable; even a parameter thawed by force gets no gradient."""
    layer = held_and_trained()
    delta, bias = layer.deltas("weight")["a"], layer.deltas("bias")["a"]

    def learning():
        return {name for name, parameter in layer.named_parameters() if parameter.requires_grad}

    expected = {"halfft_weight.a.delta"}
    assert learning() == expected
    layer.enable_adapters(False)
    assert learning() == set()
    layer.enable_adapters(True)
    assert learning() == expected
    layer.set_requires_grad("a", False)
    layer.set_requires_grad("a", True)
    assert learning() == expected
    delta.held = nn.Parameter(delta.held.detach().clone())  # as transformers' own loader does
    assert learning() == expected
    layer.requires_grad_(True)
    layer(torch.randn(3, 6)).square().sum().backward()
    assert delta.held.grad is None
    assert bias.held.grad is None
    assert delta.delta.grad is not None


def test_an_all_but_delta_never_moves_at_its_holes():
    """AdamW with weight decay and clipping: exactly zero gradient before clipping, and zero when saved."""
    layer = held_and_trained()
    delta = layer.deltas("weight")["a"]
    delta.fill(delta.dense())  # zero at the holes, as every adapter begins
    holes = [0, 13, 30]
    optimizer = torch.optim.AdamW([delta.delta], lr=0.1, weight_decay=0.1)
    for _ in range(5):
        layer(torch.randn(3, 6)).square().sum().backward()
        assert not delta.delta.grad.flatten()[holes].any()
        torch.nn.utils.clip_grad_norm_([delta.delta], 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert not delta.delta.flatten()[holes].any()
    assert delta.delta.count_nonzero() == 45
    with torch.no_grad():
        delta.delta.fill_(7.0)
    assert not delta.zero_holes("delta", delta.delta).flatten()[holes].any()


@pytest.mark.parametrize("kind", ["elements", "all_but"])
def test_a_look_under_inference_mode_does_not_spoil_training(kind):
    """The positions that it decoded serve autograd, too."""
    model = get_peft_model(tiny(), GivenConfig(kind=kind))
    with torch.inference_mode():
        model(tokens())
    learn(model, steps=1)
    assert any(numbers.any() for numbers in adapter(model).values())


def test_positions_follow_the_codes_wherever_they_come_from():
    """The decoded positions are those of the codes at hand: written in place, assigned, loaded, moved."""
    shape = (8, 6)
    layer = wrap(nn.Linear(6, 8), a={"weight": Selection.elements(shape, [1, 2, 3])})
    other = wrap(nn.Linear(6, 8), a={"weight": Selection.elements(shape, [4, 20, 47])})
    delta, new = layer.deltas("weight")["a"], other.deltas("weight")["a"]
    other_state = {f"halfft_weight.a.{key}": value.clone() for key, value in new.state_dict().items()}
    before = copy.deepcopy(layer)

    def positions(of: DeltaLayer) -> list[int]:
        return (of.weight != of.base_layer.weight).flatten().nonzero().flatten().tolist()

    def fresh() -> DeltaLayer:
        made = copy.deepcopy(before)
        assert positions(made) == [1, 2, 3]  # has decoded
        return made

    for assign in (False, True):
        made = fresh()
        made.load_state_dict(other_state, strict=False, assign=assign)
        assert positions(made) == [4, 20, 47]
    made = fresh()
    made.deltas("weight")["a"].delta_codes.copy_(new.delta_codes)
    assert positions(made) == [4, 20, 47]
    made.deltas("weight")["a"].delta_codes = delta.delta_codes.clone()
    assert positions(made) == [1, 2, 3]
    made.to(torch.bfloat16)
    assert made.deltas("weight")["a"].delta_codes.dtype == torch.uint8
    assert positions(made) == [1, 2, 3]
    with torch.inference_mode():
        made = fresh()
        made.deltas("weight")["a"].delta_codes = new.delta_codes.clone()
        assert positions(made) == [4, 20, 47]
        made.deltas("weight")["a"].delta_codes.copy_(delta.delta_codes)
        assert positions(made) == [1, 2, 3]
    assert positions(pickle.loads(pickle.dumps(fresh()))) == [1, 2, 3]


def test_positions_that_were_never_loaded_are_an_error():
    stored = StoredSelection.encode(Selection.elements((8, 6), [1, 2, 3]))
    layer = DeltaLayer(nn.Linear(6, 8), "halfft_")
    layer.update_layer("a", {"weight": dataclasses.replace(stored, data=None)})
    layer.set_adapter(["a"])
    with pytest.raises(FormatError, match="never loaded"):
        layer(torch.randn(2, 6))


def test_compiled_layers_follow_a_load():
    """A graph cannot ask for versions: a load makes the layer forget, and the graph decodes."""
    shape = (8, 6)
    layer = wrap(nn.Linear(6, 8), a={"weight": Selection.elements(shape, [1, 2, 3])})
    other = wrap(copy.deepcopy(layer.base_layer), a={"weight": Selection.elements(shape, [4, 20, 47])})
    x = torch.randn(2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other(x))
