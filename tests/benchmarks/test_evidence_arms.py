"""What the benchmark compares: the bases, the rows, and the regions of its arms."""

from __future__ import annotations

import pytest
from abilities import ABILITIES, NEW, OLD, TASKS, brevity, mixture
from arms import METHODS
from bases import WORDS, folder_of, rendered
from learn import load
from pretrain import ENOUGH, scores
from protocol import BASES

from peft_isolate import Region, plan

KINDS = [*ABILITIES, *TASKS.values()]


@pytest.mark.parametrize("base", BASES)
def test_the_bases_can_do_what_they_were_pretrained_on(base):
    """As they are kept."""
    model, tokenizer = load(folder_of(base), 0)
    assert min(scores(model, base, tokenizer).values()) >= ENOUGH
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.known], ids=lambda kind: kind.name)
def test_no_question_is_in_two_splits(kind):
    """Whatever the seed of the training rows."""
    prompts = lambda *what: {row["prompt"] for row in kind.rows(*what)}  # noqa: E731
    validation, test = prompts("validation", 100), prompts("test", 100)
    trained = set().union(*(prompts("train", 2000, seed) for seed in (0, 100)))
    assert len(validation) == len(test) == 100
    assert not validation & test
    assert not (validation | test) & trained


def test_general_text_and_preferences_keep_to_their_splits():
    """But for facts, which can only be known if they were seen."""
    for rows in (lambda split: mixture(split, 500), lambda split: brevity(split, 500)):
        asked = [{row["prompt"] for row in rows(split)} for split in ("train", "validation", "test")]
        asked = [{prompt for prompt in prompts if not prompt.startswith("FA")} for prompts in asked]
        assert all(asked)
        assert len(set().union(*asked)) == sum(map(len, asked))


def test_facts_are_judged_by_others_than_they_are_chosen_by():
    """A half each; old and new ones have no name in common."""
    for facts in (kind for kind in KINDS if kind.known):
        halves = [{row["prompt"] for row in facts.rows(split, 200)} for split in ("validation", "test", "train")]
        assert not halves[0] & halves[1]
        assert halves[0] | halves[1] == halves[2]
    assert (len(OLD), len(NEW)) == (200, 150)
    assert not {name for name, _ in OLD} & {name for name, _ in NEW}


def test_tasks_share_what_they_are_said_to_share():
    """The first letter of copy's tag, the tag of the facts, the first letter of sort's."""
    tags = {kind.name: kind.tag for kind in KINDS}
    assert (tags["cipher"][0], tags["new facts"], tags["descend"][0]) == ("C", tags["facts"], "S")
    assert len(set(tags.values())) == len(tags) - 1


def test_a_row_is_spelled_in_words_and_can_be_read_back():
    """A word for a letter, no word for two; what does not begin a line begins with a space."""
    assert len(set(WORDS.values())) == len(WORDS)
    letters = {word: letter for letter, word in WORDS.items()}
    row = ABILITIES[0].rows("test", 1)[0]
    [spelled] = rendered("words-0", [row])
    assert rendered(BASES[0], [row]) == [row]
    assert "".join(letters[word] for word in spelled["prompt"].split(" ")) == row["prompt"]
    assert spelled["completion"].startswith(" ")
    assert "".join(letters[word] for word in spelled["completion"][1:].split(" ")) == row["completion"]


@pytest.fixture(scope="module")
def regions() -> dict[str, Region]:
    """Of the arms that say what they train, on the first base."""
    names = (
        "HFT", "random rows", "random elements", "first half", "last half", "CoFiTune, no mask", "random range",
        "random matrices", "random 1 %", "full, half reset", "HFT, embeddings",
    )  # fmt: skip
    found = {}
    for name in names:
        model = load(folder_of(BASES[0]), 0)[0]
        found[name] = plan(model, METHODS[name].make(model, 7, [])).region
    return found


def test_controls_of_hft_are_halves(regions):
    """Of the same matrices; halves of the layers are apart, and together all of them."""
    layers = regions["first half"] | regions["last half"]
    assert (regions["first half"] & regions["last half"]).count == 0
    for name in ("random rows", "random elements", "first half", "last half", "HFT"):
        assert regions[name].count == pytest.approx(layers.count / 2, rel=0.01), name
        assert (regions[name] - layers).count <= 96, name  # the final norm
    assert regions["random rows"].jaccard(regions["random elements"]) == pytest.approx(1 / 3, abs=0.02)
    assert regions["random 1 %"].count == pytest.approx(layers.count / 100, rel=0.01)


def test_controls_of_cofitune_are_as_large_as_its_region(regions):
    """Elsewhere: the same modules in another range, or any matrices of the feed-forward."""
    region = regions["CoFiTune, no mask"]
    assert regions["random range"].count == region.count
    assert set(regions["random range"]) != set(region)
    assert regions["random matrices"].count == region.count
    assert set(regions["random matrices"]) != set(region)
    assert all(".mlp." in name for name in regions["random matrices"])


def test_embeddings_are_left_alone_but_where_the_arm_is_about_them(regions):
    """Also by the half-reset; TRL's loss allows no adapter on the head."""
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    assert embeddings & set(regions["HFT, embeddings"]) == {"model.embed_tokens.weight"}
    assert not embeddings & (set(regions["HFT"]) | set(regions["full, half reset"]))


def test_a_random_control_is_another_one_with_another_seed():
    """And the same one with the same."""
    for name in ("random rows", "random elements", "random matrices", "HFT", "random 1 %"):
        model = load(folder_of(BASES[0]), 0)[0]
        one, again, other = (plan(model, METHODS[name].make(model, seed, [])).region for seed in (1, 1, 2))
        assert one == again, name
        assert one.jaccard(other) < 0.9, name
