"""`benchmarks/forgetting/learn.py`: one run on a tiny base of random weights."""

from __future__ import annotations

from dataclasses import asdict, replace

import learn
import pytest
from arms import METHODS
from learn import Curve, Run
from outcomes import outcomes

BASE = "characters-0"


class Eager(Curve):
    """The slow twin: everything is asked at once, wherever it may be read."""

    def record(self, model, step):
        for alpha in self.run.alphas:
            with learn.dialled(model, alpha, self.start), learn.reset(model, self.method.reset):
                scores = self.asked(model) | {"validation": self.validation.exact_match(model)}
            self.points.append({"step": step, "alpha": alpha} | scores)

    def settle(self, model):
        pass


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    for name, few in (("STEPS", 16), ("JUDGED_STEPS", 16), ("EVERY", 1), ("EVALUATED", 40), ("TRAINED", 64)):
        monkeypatch.setattr(learn, name, few)


@pytest.mark.parametrize(("scale", "reached"), [(76.8, True), (1.0, False)], ids=["reached", "never"])
@pytest.mark.parametrize(
    ("arm", "alphas"),
    [
        ("full", (1.0, 0.85)),
        pytest.param("LoRA r=8 | random 1", (1.0, 0.85), marks=pytest.mark.slow),
        ("full, half reset", (1.0,)),
        pytest.param("HFT, 3 rounds", (1.0, 0.85), marks=pytest.mark.slow),
    ],
)
def test_what_is_asked_late_was_true_at_the_time(arm, alphas, scale, reached, bases, monkeypatch):
    """Everything is asked only around the places that are read, of the model as it was there.

    Nothing is learned word by word in a few steps, so here a score is of the loss.
    """
    monkeypatch.setattr(learn.Questions, "exact_match", lambda self, model: 1 - self.loss(model) / scale)
    method = replace(METHODS[arm.partition(" | ")[0]], round_steps=5)
    monkeypatch.setitem(METHODS, arm.partition(" | ")[0], method)
    run = Run(BASE, "A", arm, 2e-2, 0, alphas=alphas)
    late = learn.learn(run, bases)
    monkeypatch.setattr(learn, "Curve", Eager)
    eager = learn.learn(run, bases)
    assert [point["validation"] for point in late["points"]] == [point["validation"] for point in eager["points"]]
    rows, twins = (outcomes(asdict(run), result | {"seconds": 0.0}) for result in (late, eager))
    assert rows == twins
    assert [row["reached"] for row in rows] == [reached] * len(alphas)
    assert any(row["forgetting"] for row in rows)
    assert sum("old" in point for point in late["points"]) < len(late["points"])


@pytest.mark.parametrize(
    ("arm", "how", "steps"),
    [
        ("full", {"judged": True}, 4), ("full", {}, 2), ("full", {"patient": True}, 4),
        ("full, linear decay", {"judged": True}, 2), ("full", {"judged": True, "on": "words"}, 2),
    ],
)  # fmt: skip
def test_what_is_judged_may_take_longer(arm, how, steps, bases, monkeypatch):
    """But for a rate that is 0 by then, and on the large base; the slower bases would be cut off."""
    how = dict(how)
    monkeypatch.setattr(learn, "OTHER_BASE", BASE if how.pop("on", None) else "words")
    for name, few in (("STEPS", 2), ("JUDGED_STEPS", 4)):
        monkeypatch.setattr(learn, name, few)
    monkeypatch.setattr(learn.Questions, "exact_match", lambda self, model: 0.0)
    assert learn.learn(Run(BASE, "A", arm, 1e-3, 0, **how), bases)["steps"] == steps
