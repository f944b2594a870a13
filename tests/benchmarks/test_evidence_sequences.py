"""`benchmarks/forgetting/sequences.py` and what it runs: a tiny base, a few steps."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import choices
import claims
import continual
import evidence
import isolation
import learn
import preferences
import pytest
import self_samples
import sequences
import stages
import torch
from abilities import ABILITIES, TASKS, brevity
from learn import load
from measure import Questions
from peft import PeftModel
from protocol import FULL_RATES, JUDGING_SEEDS, STEPS
from stages import Course, Record, Until, backward_transfer, overall_performance, train

from peft_isolate import CoreIsolationConfig, IsolationRun, Region, core_region, plan

BASE = "characters-0"


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(learn, "EVALUATED", 8)
    monkeypatch.setattr(preferences, "EVALUATED", 8)


def course(experiment: str, order: str, arm: str, *rates: float, seed: int = 0, judged: bool = False) -> Course:
    return Course(experiment, BASE, order, arm, rates, "tried", seed, judged)


def _short(monkeypatch) -> None:
    """Courses of isolation with a few steps."""
    for name, steps in (("WORTH", 8), ("PROBE", 2), ("BACK", 2)):
        monkeypatch.setattr(isolation, name, steps)


def test_overall_performance_and_backward_transfer_are_those_of_trace():
    """Three stages, worked out by hand; R[t][i] is the score of task i after stage t."""
    R = {"A": {"A": 90.0}, "B": {"A": 60.0, "B": 80.0}, "C": {"A": 30.0, "B": 74.0, "C": 97.0}}
    then = {task: R[task][task] for task in "ABC"}
    assert overall_performance(R["C"], "ABC") == (30 + 74 + 97) / 3
    assert backward_transfer(R["C"], then) == ((30 - 90) + (74 - 80) + 0) / 3 == -22
    assert overall_performance(R["B"], "AB") == 70
    assert backward_transfer(R["B"], {"A": 90.0, "B": 80.0}) == -15
    assert backward_transfer(R["A"], {"A": 90.0}) == 0


def test_a_record_holds_each_task_against_the_stage_that_taught_it(bases, monkeypatch):
    """R_{i,i} is that of the first stage with the task: coming back to it later does not change what it is held to."""
    model, tokens = load(bases / BASE, 0)
    told = iter(
        {"A": a, "B": b, "C": 0.0, "old": old, "general": 1.0, **dict.fromkeys((x.name for x in ABILITIES), old)}
        for a, b, old in ((0, 0, 90), (80, 5, 70), (50, 60, 40), (70, 55, 45))
    )
    monkeypatch.setattr(Record, "scores", lambda self, model: next(told))
    record = Record(course("sequence", "A B", "full", 1e-3, 1e-3), model, tokens)
    for what, tasks, steps in (("A", ["A"], 7), ("B", ["B"], 5), ("a sample of A", ["A"], 2)):
        record.add(model, what, tasks, steps)
    assert [row["overall"] for row in record.rows] == [80, 55, 62.5]
    assert [row["transfer"] for row in record.rows] == [0, -15, -7.5]
    assert [row["forgetting"] for row in record.rows] == [20, 50, 45]
    assert [row["total_steps"] for row in record.rows] == [7, 12, 14]
    assert record.rows[0]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("arm", "changes"), [("HFT; a new half", 1), ("full; half reset", 2), ("replay", 0)])
def test_a_sequence_gives_a_row_for_each_stage(arm, changes, bases, monkeypatch):
    """A new half is drawn between two stages, half is reset after each."""
    monkeypatch.setattr(stages, "TRAINED", 64)
    made: list[Any] = []
    for table in (continual.AFTER, continual.BETWEEN):
        for name, change in list(table.items()):
            monkeypatch.setitem(table, name, lambda *given, change=change: made.append(change(*given)))
    rows = continual.learn_sequence(course("sequence", "B A", arm, 0.05, 0.05), bases, steps=2)
    assert [(row["stage"], row["trained"], row["steps"], row["total_steps"]) for row in rows] == [
        (1, "B", 2, 2),
        (2, "A", 2, 4),
    ]
    assert len(made) == changes
    weights = 4 * sum(p.numel() for p in load(bases / BASE, 0)[0].parameters()) / 1000
    if arm == "HFT; a new half":  # each stage trains a half, and the file holds both
        assert all(0 < row["share"] < 60 for row in rows)
        assert 0 < rows[0]["kilobytes"] < rows[1]["kilobytes"] < weights
    else:
        assert [(row["share"], row["kilobytes"]) for row in rows] == [(100, round(weights, 1))] * 2
    assert rows[0]["kl"] > 0
    assert rows[1]["kl"] > 0
    assert all(math.isfinite(row[name]) for row in rows for name in ("A", "B", "C", "overall", "rise", "forgetting"))


def test_every_arm_of_a_sequence_is_one_of_the_table_of_methods():
    """An arm says its method, its anchor, and what is done between stages, all of them known."""
    for arm in continual.arms():
        change = arm.partition("; ")[2]
        assert sequences.Arm.named(stages.trained_as(arm)).method in sequences.METHODS
        assert change == "" or change in {**continual.AFTER, **continual.BETWEEN}


def test_half_reset_puts_half_of_what_a_stage_changed_back(bases):
    """Of a model without an adapter, too, and of embeddings nothing."""
    base, tokens = load(bases / BASE, 0)
    model, _ = load(bases / BASE, 0)
    train(model, tokens, TASKS["A"].rows("train", 64), 2, 1e-3, 0)
    continual.AFTER["half reset"](model, base, 3)
    mine, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    back = {name for name in mine if torch.equal(mine[name], theirs[name])}
    matrices = {name for name in mine if ".layers." in name and mine[name].ndim == 2}
    assert 0.3 < len(back & matrices) / len(matrices) < 0.7
    assert "model.embed_tokens.weight" not in back


def test_replay_has_as_many_old_rows_as_new_ones_from_all_that_came_before():
    """In equal parts of the pretraining and of each earlier task, and none of a later one."""
    rows = continual.replayed(course("sequence", "C B A", "replay", 1e-3, 1e-3, 1e-3), 1, steps=STEPS)
    tags = [row["prompt"][:2] for row in rows]
    new, old = tags[: len(tags) // 2], tags[len(tags) // 2 :]
    assert set(new) == {"FA"}
    assert old.count("SE") == pytest.approx(len(old) / 2, rel=0.01)
    assert "CI" not in tags
    assert {"CO", "SO", "AD", "DI"} < set(old)


@pytest.mark.parametrize("every", [2, 3])
def test_a_stage_ends_where_enough_is_answered(every, bases):
    """It is asked every few steps, and not before."""
    model, tokens = load(bases / BASE, 0)
    asked = []
    until = Until(lambda model: asked.append(1) or len(asked) / 2, every)
    assert train(model, tokens, TASKS["A"].rows("train", 64), 20, 1e-3, 0, until=until) == 2 * every
    assert until.reached


@pytest.mark.parametrize("name", isolation.ARMS)
def test_every_arm_of_isolation_has_the_same_steps(name):
    """Probes, gradients and coming back are taken from what the stage of a task has."""
    arm = isolation.ARMS[name]
    stage, back = arm.steps
    assert stage > 0
    assert stage + back + arm.charged == isolation.WORTH
    assert (back > 0) == (arm.back is not None)
    assert arm.like is None or isolation.ARMS[arm.like].like is None


@pytest.mark.parametrize(
    ("name", "charged"), [("joint", 0), ("DPI", 1), ("DPI, gradient", 1), ("DPI, random", 1), ("CPI-FT, gradient", 2)]
)
def test_what_a_core_costs_is_charged(name, charged):
    """A probe; gradients, a pass each, cost as much; who fuses by gradients needs probes as well."""
    assert isolation.ARMS[name].charged == charged * isolation.PROBE


@pytest.mark.slow
def test_a_course_of_isolation_takes_the_steps_that_it_says(bases, monkeypatch):
    """Also with probes, fusion and coming back; the fusion is a row of its own."""
    monkeypatch.setattr(stages, "TRAINED", 64)
    _short(monkeypatch)
    rows = isolation.learn_isolated(course("pair", "A B", "CPI-FT", 1e-3), bases)
    assert [row["trained"] for row in rows] == ["A", "B", "fusion", "a sample of A", "a sample of B"]
    assert rows[-1]["total_steps"] == 2 * 8
    assert rows[-1]["groups"] == "A | B"
    assert rows[-1]["first"] == pytest.approx(rows[-1]["A"] - rows[0]["A"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPI", "CPI-FT"])
def test_the_stages_are_those_of_isolation_run(name, bases, tmp_path, monkeypatch):
    """The same adapter as from `IsolationRun`: only what stands in the place of a core differs in the controls."""
    _short(monkeypatch)
    ours = isolation.Isolation(course("isolation", "A B", name, 1e-3), bases)
    ours.rows = {task: rows[:40] for task, rows in ours.rows.items()}
    ours.stage_steps, ours.back_steps = 4, 4
    ours.run()
    given = stages.arguments(str(tmp_path), 1e-3, 0, sequences.METHODS["full"])
    left_out = ("output_dir", "save_strategy", "disable_tqdm")
    sft = {key: value for key, value in given.items() if key not in left_out} | {"max_steps": 4}
    tasks = {task: {"train": rows, "test": rows[:2]} for task, rows in ours.rows.items()}
    theirs = IsolationRun(
        bases / BASE, tasks, tmp_path / "run", sft=sft, probe_sft={"max_steps": 2}, order=["A", "B"],
        fuse=name == "CPI-FT", sample=40, probe_rows=40, exact_match=False, progress=False,
    ).run()  # fmt: skip
    model = PeftModel.from_pretrained(load(bases / BASE, 0)[0], theirs.final)
    ids = torch.arange(1, 25).reshape(2, 12)
    with torch.no_grad():
        found, wanted = ours.model.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
        before = load(bases / BASE, 0)[0](input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - before).abs().max() > 0.01


def test_a_random_core_has_the_size_of_a_core_and_lies_anywhere(bases):
    """Another one with another seed, over all of the scope."""
    everything = plan(load(bases / BASE, 0)[0], CoreIsolationConfig(task_type="CAUSAL_LM")).region
    found = [isolation.at_random(everything, 5.0, random.Random(seed)) for seed in (0, 1)]
    assert all(region.count == int(0.05 * everything.count) for region in found)
    assert all((region - everything).count == 0 for region in found)
    assert found[0].jaccard(found[1]) < 0.1
    sizes = {name: selection.count for name, selection in everything.items()}
    largest = max(sizes, key=sizes.__getitem__)
    assert found[0][largest].count == pytest.approx(0.05 * sizes[largest], rel=0.4)


def test_the_smallest_core_is_what_the_probe_moved_least(bases, monkeypatch):
    """Of the same size as the core, and apart from the 99 % that moved more."""
    _short(monkeypatch)
    model = isolation.Isolation(course("isolation", "A B", "CPI-FT, smallest", 1e-2), bases)
    model.probes = {"A": model.probe("A")}
    least = model.core("A")
    scope = plan(load(bases / BASE, 0)[0], CoreIsolationConfig(task_type="CAUSAL_LM")).region
    assert least.count == pytest.approx(0.01 * scope.count, abs=1)
    assert (least & core_region(bases / BASE, model.probes["A"], 90)).count == 0


def test_what_is_frozen_in_a_stage_are_the_cores_of_earlier_groups(bases, monkeypatch):
    """None for the first one, and none at all where the arm freezes nothing."""
    seen: list[Any] = []
    monkeypatch.setattr(isolation, "next_stage", lambda model, frozen: seen.append(frozen))
    monkeypatch.setattr(isolation, "train", lambda *args: args[3])
    cores = {task: Region({"w": stages_selection(i)}) for i, task in enumerate("AB")}
    for name, sizes in (("CPI-FT", [1]), ("CPI-FT, nothing frozen", [0])):
        seen.clear()
        model = isolation.Isolation(course("isolation", "A B", name, 1e-3), bases)
        model.begun, model.charge = False, 0
        model.train_groups([("A",), ("B",)], cores, model.rows, 1, "", {})
        assert [region.count for region in seen] == sizes


def stages_selection(position: int) -> isolation.Selection:
    return isolation.Selection.elements((2, 2), [position])


def test_few_rows_are_few_and_those_of_one_task_only(bases):
    """5 % of the rows of a task."""
    model = isolation.Isolation(course("isolation", "B C A", "DPI, few of C", 1e-3), bases)
    assert {task: len(rows) for task, rows in model.rows.items()} == {"B": 2000, "C": 100, "A": 2000}


@pytest.mark.parametrize(
    "arm",
    [pytest.param("LoRA r=8", marks=pytest.mark.slow), pytest.param("full | self 1", marks=pytest.mark.slow),
     "HFT; a new half"],
)  # fmt: skip
def test_preferences_are_a_stage_after_the_task(arm, bases, monkeypatch):
    """It ends where nearly all prefer the chosen answer: here a random base does, since that is the shorter one."""
    monkeypatch.setattr(choices, "frozen", dict)  # the arms are those before anything was frozen
    assert arm in preferences.arms()
    monkeypatch.setattr(stages, "TRAINED", 64)
    monkeypatch.setattr(preferences, "TRAINED", 64)
    rows = preferences.learn_preferences(course("preferences", "A P", arm, 1e-4, 0.05), bases, steps=stages.EVERY + 1)
    assert [(row["trained"], row["steps"]) for row in rows] == [("A", stages.EVERY + 1), ("P", stages.EVERY)]
    assert [row["reached"] for row in rows] == [False, True]
    assert rows[1]["validation"] == rows[1]["preferred"] == 100
    assert all(0 <= row[name] <= 100 for row in rows for name in ("chosen", "A"))
    assert rows[1]["kl"] > 0


def test_an_answer_is_preferred_where_its_tokens_and_its_end_are_likelier(bases):
    """Against the sum of log-probabilities token by token."""
    model, tokens = load(bases / BASE, 0)
    pairs = brevity("validation", 8)
    questions = Questions([{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs], tokens)
    slow = []
    for pair in pairs:
        prompt = tokens(pair["prompt"])["input_ids"]
        ids = [*tokens(pair["prompt"] + pair["chosen"])["input_ids"], tokens.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        slow.append(sum(logits[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
    torch.testing.assert_close(questions.log_likelihoods(model), torch.tensor(slow), rtol=1e-5, atol=1e-5)
    both = [preferences.Preferred([pair], tokens) for pair in pairs]
    likelier = [float(b.chosen.log_likelihoods(model)) > float(b.rejected.log_likelihoods(model)) for b in both]
    assert preferences.Preferred(pairs, tokens).share(model) == pytest.approx(sum(likelier) / 8)


def test_the_rate_of_an_arm_is_the_best_on_validation_once_all_were_tried(tmp_path):
    """By the last stage; an arm that varies another has that one's; a tie goes to the lower rate."""
    rows = []
    for rate, (first, last) in zip(FULL_RATES, ((99, 10), (0, 80), (0, 80), (99, 70), (99, 0)), strict=True):
        for stage, validation in enumerate((first, last), 1):
            one = course("isolation", sequences.GIVEN, "DPI", rate, seed=100)
            rows.append({**one.columns(), "stage": stage, "validation": validation})
    assert sequences.best_rate(rows, "DPI") == FULL_RATES[1]
    assert sequences.best_rate(rows, "DPI, random") == FULL_RATES[1]
    assert sequences.best_rate(rows[:-2], "DPI") is None
    assert sequences.best_rate(rows, "CPI-FT") is None
    assert {c.arm for c in sequences.isolations(rows)} == {
        name for name, arm in isolation.ARMS.items() if "DPI" in (name, arm.like) and "τ" not in name
    }
    assert {(c.order, c.arm, c.rates, c.seed) for c in sequences.pairs(rows)} == {
        (order, "DPI", (FULL_RATES[1],), seed) for order in ("A B", "B A") for seed in sequences.SEEDS
    }


def test_every_claim_about_courses_gets_the_pairs_that_a_verdict_needs():
    """Once all rates were tried."""
    rows = [
        {**course("isolation", sequences.GIVEN, arm, rate, seed=100).columns(), "stage": 1, "validation": 50}
        for arm in isolation.RATED
        for rate in FULL_RATES
    ]
    for c in sequences.preference_rates([]):
        rows.append({**c.columns(), "trained": "P", "reached": True, "validation": 99})
    for seed in JUDGING_SEEDS:
        usual = dataclasses.replace(course("isolation", sequences.GIVEN, "CPI-FT", 5e-5, seed=seed), judged=True)
        rows.append({**usual.columns(), "stage": 1, "jaccard": "BC 0.0069, BA 0.2000, CA 0.0068"})
    planned = [c for stage in sequences.STAGES for c in stage(rows) if c.judged]
    runs = {(c.experiment, c.arm, c.order, c.seed) for c in planned}
    for claim in claims.CLAIMS:
        for than in claim.than if claim.course else ():
            experiment = claim.course[0]
            one, other = (
                {run[2:] for run in runs if run[:2] == (experiment, arm) and claim.order in ("", run[2])}
                for arm in (claim.less, than)
            )
            assert len(one & other) >= claims.ENOUGH_PAIRS, (claim.says, than)


def test_a_threshold_that_links_the_same_tasks_is_not_run_again():
    """By the overlaps of the arm that it varies, with the same seed."""
    rows = [
        {**course("isolation", sequences.GIVEN, "DPI", rate, seed=100).columns(), "stage": 1, "validation": 50}
        for rate in FULL_RATES
    ]
    told = {10: "BC 0.0069, BA 0.0025, CA 0.0068", 11: "BC 0.3500, BA 0.0600, CA 0.0100"}
    for seed, jaccard in told.items():
        usual = dataclasses.replace(course("isolation", sequences.GIVEN, "DPI", 5e-5, seed=seed), judged=True)
        rows += [{**usual.columns(), "stage": stage, "jaccard": jaccard} for stage in (1, 2)]
    found = sequences.thresholds(rows)
    assert sorted((c.seed, c.arm) for c in found) == [
        (10, "DPI, τ = 0.0"), (11, "DPI, τ = 0.0"), (11, "DPI, τ = 0.05"), (11, "DPI, τ = None"),
    ]  # fmt: skip
    assert all(c.judged and c.rates == (FULL_RATES[0],) for c in found)


def test_preferences_are_judged_at_the_lowest_rate_that_reaches(monkeypatch):
    """Not before an arm was tried with all of its rates."""
    monkeypatch.setattr(sequences, "CLAIMED", set())
    rows = []
    for c in sequences.preference_rates([]):
        reached = c.rates[1] > 1.5e-5
        rows.append({**c.columns(), "trained": "P", "reached": reached, "validation": 99 if reached else 20})
    found = sequences.preferred(rows)
    assert len(found) == 3 * len(preferences.arms())
    assert {stages.said(c.rates[1:]) for c in found if c.arm == "full"} == {"2e-05"}
    assert {c.arm for c in sequences.preferred(rows[1:])} == set(preferences.arms()) - {rows[0]["arm"]}


def test_a_course_that_is_in_the_book_is_not_run_again(tmp_path):
    """Rows are read as they were written; those of a course that is made again make way together."""
    book = dataclasses.replace(sequences.BOOK, path=tmp_path / "sequences.csv")
    done, other = (course("isolation", "B C A", arm, 5e-4) for arm in ("CPI-FT", "DPI"))
    new = [{**done.columns(), "stage": i, "groups": "B | C+A", "jaccard": "", "commit": "1234567890"} for i in (1, 2)]
    rows: list[dict[str, Any]] = []
    book.add(rows, new)
    assert book.rows() == new
    assert book.pending([done, other, other], book.rows()) == [other]
    book.add(rows, new[:1])
    assert len(book.rows()) == 1


def test_a_run_is_made_again_where_one_of_its_rows_lacks(tmp_path):
    """A run has a row for each place of the dial."""
    book = dataclasses.replace(evidence.BOOK, path=tmp_path / "runs.csv")
    run = evidence.Run(BASE, "A", "HFT", 1e-4, 0, alphas=(1.0, 0.7))
    both = [{**row, "reached": True, "forgetting": 1.5} for row in evidence.keys(run)]
    assert book.pending([run], []) == [run]
    assert book.pending([run], both[:1]) == [run]
    assert book.pending([run], both) == []


def test_every_old_row_is_a_valid_prompt_with_the_right_answer():
    """And with another answer, or without its end, it is a valid prompt alone."""
    for ability in ABILITIES:
        for row in ability.rows("train", 30):
            text = row["prompt"] + row["completion"]
            assert self_samples.judged(text + "</s>") == (ability, True)
            assert self_samples.judged(text) == (ability, False)
            assert self_samples.judged(text + "a</s>") == (ability, False)
            assert self_samples.judged(text[1:] + "</s>") == (None, False)
    assert self_samples.judged("FAabc=kl</s>") == (None, False)
    found = {row["ability"]: row for row in self_samples.shares(["COabcde=abcde</s>", "COabcde=abcdf</s>", "x", "x"])}
    assert (found["all"]["valid"], found["all"]["right"], found["all"]["distinct"]) == (50, 25, 75)
    assert (found["copy"]["valid"], found["sort"]["valid"]) == (50, 0)


def test_samples_are_what_the_base_writes(bases):
    """As many as asked for, without what only fills the rows."""
    texts = self_samples.samples(bases / BASE, 1.0, 12, seed=0)
    assert len(texts) == 12
    assert len(set(texts)) > 6
    assert not any(text.endswith("<pad><pad>") for text in texts)
