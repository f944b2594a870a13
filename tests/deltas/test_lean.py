"""What was made fast does what its slow, obvious twin does, and remembers nothing that could change."""

import hashlib
import json

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_isolate import CoreIsolationConfig, HalfFTConfig, Region
from peft_isolate.deltas.adapters import layers_of
from peft_isolate.deltas.compose import compose
from peft_isolate.deltas.config import _layers_digest
from peft_isolate.deltas.in_place import changes
from peft_isolate.deltas.support import Support, write
from peft_isolate.deltas.targets import trained_beside
from peft_isolate.deltas.terms import Part
from peft_isolate.errors import IsolateError
from peft_isolate.regions import Selection
from peft_isolate.regions.fingerprint import fingerprint
from peft_isolate.regions.roles import roles
from tests.models import CONFIGS, tiny

SHAPE = (6, 10)
SELECTIONS = {
    "elements": Selection.elements(SHAPE, [1, 7, 8, 31, 59]),
    "all but": Selection.all_but(SHAPE, [0, 30, 59]),
    "rows in blocks": Selection.rows(SHAPE, [1, 2]),
    "rows anywhere": Selection.rows(SHAPE, [0, 1, 4]),
    "columns in blocks": Selection.columns(SHAPE, [2, 3]),
    "columns anywhere": Selection.columns(SHAPE, [0, 5, 6]),
    "whole": Selection.whole(SHAPE),
}


def part_on(selection: Selection) -> Part:
    """Random numbers on a selection."""
    support, index = Support.of(selection)
    dense = torch.randn(SHAPE)
    n = selection.indices.numel()
    shape = {"rows": (n, SHAPE[1]), "columns": (SHAPE[0], n), "elements": (n,)}.get(selection.kind, SHAPE)
    return Part(dense.flatten()[: torch.Size(shape).numel()].reshape(shape), support, index, torch.empty(0), False)


def adapted(selection: Selection, n_layers: int = 1) -> nn.Module:
    """Linear layers with random deltas on one selection of each weight."""
    region = Region({f"{i}.weight": selection for i in range(n_layers)})
    base = nn.Sequential(*(nn.Linear(SHAPE[1], SHAPE[0], bias=False) for _ in range(n_layers)))
    names = [f"{i}" for i in range(n_layers)]
    return get_peft_model(
        base, CoreIsolationConfig(train="core", core=region, target_modules=names, init_weights=False)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("contiguous", [(True, True), (False, False), (False, True)])
@pytest.mark.parametrize("kind", SELECTIONS)
def test_changes_are_what_compose_gives(kind, contiguous, scale, dtype):
    """Written where they say, they make W0 the composed weight, to the bit; W0 is not touched before."""
    torch.manual_seed(0)
    w0 = torch.randn(SHAPE).to(dtype)
    parameter, w0 = (w0.clone() if yes else w0.T.contiguous().T for yes in contiguous)
    part = part_on(SELECTIONS[kind])
    part = part._replace(numbers=part.numbers.to(dtype))
    terms = Part.terms([part], [scale], disjoint=True)
    kept = w0.clone()
    found = changes(parameter, w0, terms)
    assert torch.equal(w0, kept)
    assert torch.equal(parameter, kept)
    before = parameter.clone()
    for change in found:
        write(parameter, change.support, change.at, change.after)
    assert torch.equal(parameter, compose(w0, terms))
    for change in found:
        write(parameter, change.support, change.at, change.before)
    assert torch.equal(parameter, before)


def test_changes_of_what_overlaps_are_composed_whole():
    """Two adapters on the same scalars are summed once, in fp32, and rounded once."""
    torch.manual_seed(0)
    w0 = torch.randn(SHAPE).bfloat16()
    parts = [part_on(SELECTIONS[kind]) for kind in ("elements", "rows anywhere")]
    terms = Part.terms(parts, [1.0, 0.3], disjoint=False)
    parameter = w0.clone()
    for change in changes(parameter, w0, terms):
        write(parameter, change.support, change.at, change.after)
    assert torch.equal(parameter, compose(w0, terms))


def test_only_the_support_is_written():
    """1 % of the scalars cost 1 %: nothing whole is composed for them."""
    terms = Part.terms([part_on(SELECTIONS["elements"])], [1.0], disjoint=True)
    w0 = torch.randn(SHAPE)
    (change,) = changes(w0, w0, terms)
    assert change.after.numel() == 5


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("kind", SELECTIONS)
def test_merge_and_unmerge_to_the_bit(kind, contiguous):
    """Merged weights are the composed ones, and what unmerge gives back is W0, also of a transposed weight."""
    torch.manual_seed(0)
    model = adapted(SELECTIONS[kind])
    (layer,) = layers_of(model).values()
    if not contiguous:
        layer.base_layer.weight.data = layer.base_layer.weight.data.T.contiguous().T
    w0, weight = layer.base_layer.weight.detach().clone(), layer.weight.detach().clone()
    assert not torch.equal(w0, weight)
    for _ in range(2):
        model.merge_adapter()
        assert torch.equal(layer.base_layer.weight, weight)
        assert torch.equal(layer.base_parameter("weight"), w0)
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.weight, w0)


@pytest.mark.parametrize(
    "kinds", [("elements", "rows anywhere"), ("elements", "elements"), ("rows in blocks", "whole")]
)
def test_a_second_merge_composes_from_w0(kinds):
    """Merged one after the other, two adapters give the weight that both have unmerged."""
    torch.manual_seed(0)
    model = adapted(SELECTIONS[kinds[0]]).bfloat16()
    region = Region({"0.weight": SELECTIONS[kinds[1]]})
    config = CoreIsolationConfig(train="core", core=region, target_modules=["0"], init_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    (layer,) = layers_of(model).values()
    w0, weight = layer.base_layer.weight.detach().clone(), layer.weight.detach().clone()
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert torch.equal(layer.base_layer.weight, weight)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, w0)


def test_merge_keeps_w0_under_each_part():
    """What learns and what is held stand on scalars of their own: each has its own W0 kept."""
    torch.manual_seed(0)
    model = adapted(SELECTIONS["elements"])
    (layer,) = layers_of(model).values()
    held = Selection.elements(SHAPE, [0, 2, 9, 33, 58])
    layer.update_layer("default", {"weight": SELECTIONS["elements"]}, {"weight": held}, zero=False)
    nn.init.normal_(layer.deltas("weight")["default"].held)
    w0, weight = layer.base_layer.weight.detach().clone(), layer.weight.detach().clone()
    assert (w0 != weight).sum() == 10
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, weight)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, w0)


def test_a_merge_that_cannot_be_keeps_nothing():
    """Numbers that were never loaded stop it before W0 is kept or written."""
    model = adapted(SELECTIONS["rows in blocks"])
    (layer,) = layers_of(model).values()
    layer.deltas("weight")["default"].to("meta")
    w0 = layer.base_layer.weight.detach().clone()
    with pytest.raises(IsolateError, match="meta"):
        model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, w0)
    assert not layer._originals
    assert not layer.merged


class Elsewhere(nn.Parameter):
    """Stands for a sharded or quantised parameter: another class than torch's own."""


@pytest.mark.parametrize("where", ["base", "delta"])
def test_the_path_is_that_of_the_parameters_there_are_now(where):
    """FSDP2 swaps parameters between forwards, offloading takes them away: nothing of the path is remembered."""
    model = adapted(SELECTIONS["elements"])
    (layer,) = layers_of(model).values()
    module, name = (layer.base_layer, "weight") if where == "base" else (layer.deltas("weight")["default"], "delta")
    whole = module._parameters[name]
    assert layer.path == "compose"
    module._parameters[name] = Elsewhere(whole.detach(), requires_grad=False)
    assert layer.path == "side"
    module._parameters[name] = whole
    assert layer.path == "compose"
    whole.ds_id = 1
    assert layer.path == "side"


def test_the_path_looks_at_every_parameter_and_adapter():
    """One that is elsewhere is enough, be it a bias, or of the second adapter."""
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), HalfFTConfig(target_modules=["0"], fraction=1.0))
    model.add_adapter("second", HalfFTConfig(target_modules=["0"], fraction=1.0))
    (layer,) = layers_of(model).values()
    assert layer.parameter_names == ["weight", "bias"]
    for module, name in ((layer.base_layer, "bias"), (layer.deltas("bias")["second"], "delta")):
        whole = module._parameters[name]
        module._parameters[name] = Elsewhere(whole.detach(), requires_grad=False)
        assert layer.path == "side"
        module._parameters[name] = whole
    assert layer.path == "compose"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_digest_of_the_layers_is_that_of_their_roles(name):
    """It asks for names and shapes alone, and is what it was when every role was found for it."""
    model = tiny(name)
    every = roles(model)
    counted = [role for role in every if role.layer is not None] or every
    named = sorted({(role.parameter, role.selection.shape) for role in counted})
    assert _layers_digest(model) == hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def test_the_digest_of_a_model_without_layers_is_that_of_all_it_has():
    """Else every such model had the same."""
    assert _layers_digest(nn.Linear(2, 2)) != _layers_digest(nn.Linear(2, 3))


def test_new_tokens_take_embeddings_and_head_out_of_the_base():
    """Both are others after each resizing; a module that is saved whole takes out only itself."""
    model = tiny("llama")
    assert trained_beside(model, HalfFTConfig()) == set()
    assert trained_beside(model, HalfFTConfig(trainable_token_indices=[1])) == {"model.embed_tokens", "lm_head"}
    assert trained_beside(model, HalfFTConfig(modules_to_save=["self_attn.rotary", "model.norm"])) == {"model.norm"}


def test_samples_do_not_depend_on_strides():
    """A contiguous tensor is sampled as one list, any other by coordinates: the same scalars."""
    x = torch.randn(3, 5, 7)
    for view in (x, x.transpose(0, 2), x[:, ::2], x[0, 0, 0], torch.randn(2).expand(4, 2)):
        assert fingerprint([("x", view)]) == fingerprint([("x", view.contiguous())])


def test_unmerge_restores_a_base_of_inference_tensors():
    """Views of which do not call themselves views."""
    with torch.inference_mode():
        model = get_peft_model(tiny("phi3"), HalfFTConfig(init_weights=False))
        before = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
        model.merge_adapter()
        assert any(not torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
        model.unmerge_adapter()
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)


def test_merging_takes_the_tokens_that_learn_along():
    model = get_peft_model(tiny("llama"), HalfFTConfig(trainable_token_indices=[3, 4]))
    (tokens,) = (m for m in model.modules() if type(m).__name__ == "TrainableTokensLayer")
    before = tokens.base_layer.weight.detach().clone()
    with torch.no_grad():
        tokens.trainable_tokens_delta["default"].add_(1.0)
    model.merge_adapter()
    assert tokens.merged
    assert torch.equal(tokens.base_layer.weight[3:5], tokens.trainable_tokens_delta["default"])
    model.unmerge_adapter()
    assert torch.equal(tokens.base_layer.weight, before)


@pytest.mark.parametrize("n", [5, 64, 300])
def test_one_row_of_unusual_strides_gives_the_merged_model_s_bits(n):
    """Its strides say nothing about where its scalars are, and yet choose the kernel."""
    for seed in range(10):
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(n, 1))
        base[0].weight = nn.Parameter(torch.randn(n, 1).t())
        model = get_peft_model(base, HalfFTConfig(target_modules=["0"], init_weights=False))
        x = torch.randn(1, n)
        adapted = model(x)
        assert torch.equal(adapted, model.merge_and_unload()(x))


def test_wider_deltas_by_elements_are_rounded_once():
    torch.manual_seed(0)
    core = Region({"0.weight": Selection.elements((64, 64), range(0, 4000, 3))})
    model = get_peft_model(
        nn.Sequential(nn.Linear(64, 64)), CoreIsolationConfig(train="core", core=core, init_weights=False)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.double() + 1e-9
    x = torch.randn(3, 64)
    adapted = model(x)
    assert torch.equal(adapted, model.merge_and_unload()(x))


def test_selective_checkpointing_may_keep_everything():
    """What it keeps must not lie in a buffer that the next layer writes to."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model = get_peft_model(base, HalfFTConfig(target_modules=["0", "2"], fraction=1.0, init_weights=False))
    x = torch.randn(4, 16, requires_grad=True)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    keep = lambda *_, **__: CheckpointPolicy.MUST_SAVE  # noqa: E731
    checkpoint(
        model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keep)
    ).sum().backward()  # fmt: skip
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
