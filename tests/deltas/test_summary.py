"""The summary of an adapter: equal to a slow twin, whatever the selections and however its tensors are fused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_isolate import CoFiTuneConfig, HalfFTConfig, next_round
from peft_isolate.deltas.about import measure
from peft_isolate.deltas.about.measure import summarise
from peft_isolate.deltas.about.summary import Summary
from peft_isolate.deltas.adapters import parameter_deltas
from peft_isolate.errors import IsolateError
from peft_isolate.regions import Region, base_parameters, roles
from peft_isolate.regions.plots import magnitude_text, plot_magnitudes
from tests.given import GivenConfig
from tests.importances import importance
from tests.learn import filled
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take")

KINDS = ("whole", "rows", "columns", "elements", "all_but")
# Fused rows, fused columns, one tensor for all experts, two stacks.
ARCHITECTURES = ("llama", "phi3", "gpt2", "mixtral", "t5")


def wrapped(architecture: str, config, **options) -> nn.Module:
    return filled(get_peft_model(tiny(architecture, **options), config))


def summary_of(model: nn.Module, with_model: bool = True, given: dict | None = None) -> Summary:
    deltas = parameter_deltas(model, "default")
    items = ((name, delta, (given or {}).get(name, {})) for name, delta in deltas.items())
    return summarise(model.peft_config["default"], items, model if with_model else None, n_bytes=7)


def twin(model: nn.Module) -> dict:
    """{(layer, role): (parameters, scalars, trained, held, rms, largest)}, scalar by scalar."""
    found: dict = {}
    deltas = parameter_deltas(model, "default")
    of_parameter: dict = {}
    for role in roles(model):
        of_parameter.setdefault((role.parameter, role.layer, role.name), []).append(role.selection)
    for (parameter, layer, role), selections in of_parameter.items():
        cell = found.setdefault((layer, role), [0, 0, 0, 0, []])
        block = torch.stack([selection.mask() for selection in selections]).any(0)
        cell[1] += int(block.sum())
        if parameter not in deltas:
            continue
        trained, held = (deltas[parameter].selection(part).mask() & block for part in ("delta", "held"))
        cell[0] += int((trained | held).any())
        cell[2] += int(trained.sum())
        cell[3] += int(held.sum())
        cell[4].append(deltas[parameter].dense().double()[trained | held])
    return {
        key: (*counts, values.square().mean().sqrt().item() if len(values) else 0.0,
              values.abs().max().item() if len(values) else 0.0)
        for key, (*counts, parts) in found.items()
        for values in [torch.cat(parts) if parts else torch.zeros(0)]
    }  # fmt: skip


def assert_equal_twin(model: nn.Module) -> Summary:
    summary, wanted = summary_of(model), twin(model)
    assert {(row.layer, row.role) for row in summary.rows} == wanted.keys()
    for row in summary.rows:
        *counts, rms, largest = wanted[row.layer, row.role]
        assert [row.parameters, row.scalars, row.trained, row.held] == counts, row
        assert math.isclose(row.rms, rms, rel_tol=1e-9), row
        assert math.isclose(row.largest, largest, rel_tol=1e-7), row
    everything = torch.cat([d.dense()[(d.selection() | d.selection("held")).mask()]
                            for d in parameter_deltas(model, "default").values()]).double()  # fmt: skip
    assert summary.trained + summary.held == everything.numel()
    assert math.isclose(summary.rms, everything.square().mean().sqrt().item(), rel_tol=1e-9)
    assert math.isclose(summary.largest, everything.abs().max().item(), rel_tol=1e-7)
    assert summary.total == Region.whole(model.get_base_model()).count
    assert summary.base_bytes == sum(p.numel() * p.element_size() for p in base_parameters(model).values())
    return summary


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_equals_its_slow_twin(architecture, kind):
    """Every kind of selection, of fused and of plain tensors, also what holes hide."""
    summary = assert_equal_twin(wrapped(architecture, GivenConfig(kind=kind)))
    kinds = {kind for row in summary.rows for kind in row.kinds}
    assert kind in kinds
    assert kinds <= {kind, "whole"}  # one row of a vector is all of it


def test_what_stands_at_holes_counts_for_nothing():
    model = wrapped("llama", GivenConfig(kind="all_but"))
    before = summary_of(model)
    for delta in parameter_deltas(model, "default").values():
        holes = ~delta.selection().mask()
        delta.delta.data[holes] = 1e3
    assert summary_of(model).rows == before.rows


def test_held_numbers_are_counted_apart():
    model = wrapped("llama", HalfFTConfig())
    next_round(model)
    summary = assert_equal_twin(filled(model, seed=3))
    assert summary.held > 0
    assert summary.trained > 0


@pytest.mark.parametrize("damps", ["update", "gradient"])
def test_a_soft_mask_is_in_the_numbers_where_it_damps_the_update(damps):
    config = CoFiTuneConfig(layer_range=(0, 1), modules="MHA+FFN", soft_mask=damps, importance=importance("llama"))
    model = wrapped("llama", config)
    summary = assert_equal_twin(model)
    bare = max(delta.delta.detach().abs().max().item() for delta in parameter_deltas(model, "default").values())
    assert (summary.largest < bare) == (damps == "update")
    assert summary.masked == len(config.resolved["masks"]) > 0


def test_columns_are_damped_too():
    config = CoFiTuneConfig(layer_range=(0, 1), modules="FFN", importance=importance("gpt2"))
    assert_equal_twin(wrapped("gpt2", config))


def test_large_tensors_are_summed_in_pieces(monkeypatch):
    model = wrapped("llama", HalfFTConfig())
    whole = summary_of(model)
    monkeypatch.setattr(measure, "CHUNK", 7)
    pieces = summary_of(model)
    for one, other in zip(whole.rows, pieces.rows, strict=True):
        assert math.isclose(one.rms, other.rms, rel_tol=1e-12)
        assert one.largest == other.largest


def test_numbers_that_are_given_count_instead_of_the_deltas_own():
    """As where the file has other ones than the memory: rounded, or gathered from shards."""
    model = wrapped("llama", HalfFTConfig())
    deltas = parameter_deltas(model, "default")
    given = {
        name: {"delta": torch.full_like(delta.delta, -2.0, dtype=torch.bfloat16)} for name, delta in deltas.items()
    }
    summary = summary_of(model, given=given)
    assert (summary.rms, summary.largest, summary.dtype) == (2.0, 2.0, "bfloat16")
    assert summary_of(model).dtype == "float32"


def test_without_a_model_the_names_tell_layer_and_role():
    model = wrapped("mixtral", HalfFTConfig())
    known, guessed = summary_of(model), summary_of(model, with_model=False)
    assert (guessed.total, guessed.base_bytes, guessed.share) == (None, None, None)
    assert (guessed.trained, guessed.held) == (known.trained, known.held)
    assert math.isclose(guessed.rms, known.rms, rel_tol=1e-12)
    assert {row.layer for row in guessed.rows} == {0, 1, 2, None}
    assert {"self_attn", "q_proj", "experts"} - {row.role for row in guessed.rows} == {"self_attn"}
    assert all(row.scalars is None for row in guessed.rows)
    assert "layer" in str(guessed)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("model.layers.11.mlp.up_proj.weight", (11, "up_proj")),
        ("encoder.block.3.layer.0.q.weight", (3, "q")),
        ("experts.4.weight", (4, "experts")),
        ("0.weight", (0, "unknown")),
        ("weight", (None, "unknown")),
        (f"{'9' * 5000}.weight", (None, "unknown")),
        ("a.²3.weight", (None, "²3")),
    ],
)
def test_layers_and_roles_by_name(name, key):
    assert measure._by_name(name) == key


def test_a_role_in_one_row():
    model = wrapped("llama", HalfFTConfig())
    summary = summary_of(model)
    q = summary.by_role()["q"]
    rows = [row for row in summary.rows if row.role == "q"]
    assert q.trained == sum(row.trained for row in rows)
    assert q.scalars == sum(row.scalars for row in rows)
    assert q.parameters == sum(row.parameters for row in rows) == 2
    assert q.largest == max(row.largest for row in rows)
    values = [d.dense() for name, d in parameter_deltas(model, "default").items() if "q_proj" in name]
    assert math.isclose(q.rms, torch.cat(values).double().square().mean().sqrt().item(), rel_tol=1e-9)
    assert list(summary.by_role())[:2] == ["q", "k"]
    assert summary.by_role()["up"].kinds == ()


def test_rows_come_in_the_order_of_layers_and_roles():
    keys = [(row.layer, row.role) for row in summary_of(wrapped("llama", HalfFTConfig())).rows]
    assert keys[:3] == [(0, "q"), (0, "k"), (0, "v")]
    assert keys[-3:] == [(None, "norm"), (None, "embedding"), (None, "head")]


def test_a_diverged_delta_shows():
    """A summary hides no NaN behind larger numbers."""
    model = wrapped("llama", HalfFTConfig())
    next(iter(parameter_deltas(model, "default").values())).delta.data[0] = math.nan
    summary = summary_of(model)
    assert math.isnan(summary.rms)
    assert math.isnan(summary.largest)
    assert "nan" in str(summary)


def test_numbers_beyond_all_measure_end_no_summary():
    """A stranger's file may hold float64, whose squares overflow."""
    model = get_peft_model(tiny(dtype=torch.float64), HalfFTConfig())
    for delta in parameter_deltas(model, "default").values():
        delta.delta.data.fill_(1e300)
    summary = summary_of(model)
    assert (summary.rms, summary.largest) == (math.inf, 1e300)
    assert "inf" in str(summary)


def test_it_tells_the_config_and_the_base():
    config = HalfFTConfig(seed=3, layers_to_transform=[0, 2], task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    summary = summary_of(wrapped("llama", config))
    assert (summary.method, summary.title) == ("HALFFT", "Half Fine-Tuning (HFT)")
    assert summary.paper.endswith("2404.18466")
    wanted = {"fraction": 0.5, "granularity": "category", "balance": "count", "round_index": 0, "seed": 3,
              "train_embeddings": False, "layers_to_transform": [0, 2], "modules_to_save": ["lm_head"]}  # fmt: skip
    assert summary.fields == wanted
    assert (summary.task, summary.base_class, summary.fingerprint) == ("CAUSAL_LM", "LlamaForCausalLM", True)
    assert summary.beside == ("lm_head",)
    assert "lm_head: saved by PEFT" in str(summary)


def test_token_rows_stand_beside():
    config = HalfFTConfig(trainable_token_indices=[3, 4])
    model = get_peft_model(tiny(), config)
    assert summary_of(model).beside == ("model.embed_tokens",)
    assert summary_of(model, with_model=False).beside == ("input embeddings",)


def test_a_base_of_nobodys_library_has_no_class():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), HalfFTConfig(target_modules=["0"]))
    assert summary_of(model).base_class is None


@pytest.mark.parametrize(
    ("mapping", "name"),
    [
        ({"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama"}, "LlamaForCausalLM"),
        ({"base_model_class": "x; import os", "parent_library": "transformers.models.llama"}, None),
        ({"base_model_class": "Model", "parent_library": "__main__"}, None),
        (None, None),
    ],
)
def test_without_a_model_the_config_names_the_class(mapping, name):
    """A stranger's config puts no code into a card."""
    model = wrapped("llama", HalfFTConfig())
    model.peft_config["default"].auto_mapping = mapping
    assert summary_of(model, with_model=False).base_class == name


def test_its_json_is_json():
    summary = summary_of(wrapped("llama", CoFiTuneConfig(target_modules=["up_proj", "q_proj"])))
    plain = summary.as_plain()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["rows"][0]["role"] == summary.rows[0].role
    assert plain["trained"] == summary.trained
    assert plain["fields"]["target_modules"] == ["q_proj", "up_proj"]


def test_it_prints_a_table():
    summary = summary_of(wrapped("llama", HalfFTConfig()))
    lines = str(summary).splitlines()
    assert lines[0].split() == ["role", "layer", "selection", "parameters", "trained", "held", "share", "rms", "Δ",
                                "largest", "|Δ|"]  # fmt: skip
    assert sum(line.startswith("q ") for line in lines) == 2
    assert f"{summary.trained:,} trained, 0 held of {summary.total:,} scalars, {summary.share:.2%}" in str(summary)


def test_the_picture_is_one(tmp_path: Path):
    pytest.importorskip("matplotlib")
    summary_of(wrapped("llama", HalfFTConfig())).plot(tmp_path / "delta.png")
    assert (tmp_path / "delta.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("magnitude", [-1.0, math.nan, math.inf])
def test_what_is_no_magnitude_is_not_drawn(magnitude, tmp_path: Path):
    pytest.importorskip("matplotlib")
    with pytest.raises(IsolateError, match="the magnitude of \\(0, 'q'\\)"):
        plot_magnitudes({(0, "q"): magnitude}, tmp_path / "delta.png")
    with pytest.raises(IsolateError, match="no magnitudes"):
        plot_magnitudes({}, tmp_path / "delta.png")
    assert not list(tmp_path.iterdir())


def test_the_largest_magnitude_is_the_darkest(tmp_path: Path, monkeypatch):
    """Also where all are far below one, or zero."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kw: (kept.append(self), Path(path).touch()))
    plot_magnitudes({(0, "q"): 0.0, (0, "k"): 1e-7, (0, "v"): 2e-7}, tmp_path / "a.png")
    plot_magnitudes({(0, "q"): 0.0}, tmp_path / "b.png")
    cells = [[sum(p.get_facecolor()[:3]) for p in f.axes[0].patches if isinstance(p, Rectangle) and not p.get_hatch()]
             for f in kept]  # fmt: skip
    assert cells[0] == sorted(cells[0], reverse=True)
    assert len(set(cells[0])) == 3
    assert cells[1] == [cells[0][0]]
    assert [text.get_text() for text in kept[0].axes[0].texts] == ["0", "1.0e-7", "2.0e-7"]
    assert [text.get_text() for text in kept[0].axes[1].get_yticklabels()] == ["0", "2.0e-7"]


@pytest.mark.parametrize(
    ("magnitude", "text"),
    [
        (0.0, "0"),
        (1.0, "1.0e0"),
        (0.00012345, "1.2e-4"),
        (12345.0, "1.2e4"),
        (1e-300, "1.0e-300"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_magnitudes_have_two_digits(magnitude, text):
    assert magnitude_text(magnitude) == text
