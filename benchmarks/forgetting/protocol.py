"""What is fixed before anything is judged: how a run is made, what is compared where, and what is chosen by what.

The *outcome* of a run is what the model has forgotten when the new task's validation first reaches `ENOUGH`: the loss
of old abilities' exact match, in points, interpolated between the evaluations before and after. What a run is judged
by, the test split, is never chosen by.
"""

from __future__ import annotations

# Of the new task's validation, exact match.
ENOUGH = 0.95
# Steps between evaluations, and at most; a run that has reached `ENOUGH` by then has "reached" it. What is judged may
# take twice as long as what is chosen by: other bases learn more slowly, and else the limit would be judged.
EVERY, STEPS, JUDGED_STEPS = 10, 400, 800
# Rows a step, rows to train on, and rows of each kind to evaluate on.
BATCH, TRAINED, EVALUATED = 32, 2000, 100
WARMUP = 10

BASES = ("characters-0", "characters-1", "characters-2")
# Everything is chosen on this base and task, or, where a rate is a task's own, on this base.
DEVELOPED_ON = (BASES[0], "A")
# Of the data's order, what a method draws, and dropout. Those to choose by are not among those to judge by; 0 to 4
# were meant for a first judging, which was cut short (docs/evidence.md).
CHOOSING_SEEDS, JUDGING_SEEDS = (100, 101, 102), (10, 11, 12, 13, 14)

# Learning rates that each method is tried with on each task. On `DEVELOPED_ON` a rate below the lowest was tried, too:
# half as fast, and 0.1 to 2.4 points less forgotten (`results/runs.csv`).
FULL_RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
LOW_RANK_RATES = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
SPARSE_RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)

# What is compared: in each family four variants with five rates, none is tried more often than another. Which variant
# is judged is chosen by what is forgotten of the validation split, on `DEVELOPED_ON`; of what is tied, the first.
FAMILIES = {
    "full": ("full", "full, embeddings frozen", "full, no warm-up", "full, linear decay"),
    "LoRA": ("LoRA r=8", "LoRA r=32", "LoRA r=8, attention", "LoRA r=8, MLP"),
    "HFT": ("HFT", "HFT, layers", "HFT, model", "HFT, 0.7"),
    "CoFiTune": ("CoFiTune", "CoFiTune, no mask", "CoFiTune, gradient", "CoFiTune, (½, ¾]"),
    "random region": ("random rows", "random elements", "first half", "last half"),
}
# Each family's variant gets the same anchors and the same places of the dial, and the best is frozen. (At α = 0.7 what
# was tried did not come to `ENOUGH` in `STEPS`.)
ANCHORS = ("none", "random 0.3", "random 1", "self 1", "self 3")
ALPHAS = (1.0, 0.85)
# Beside the families: a peer with five rates and no variants, and what sees old rows.
PEERS, UPPER_BOUND = ("SHiRA",), "replay"
# Explored beside every method: an anchor on old rows, which most users do not have, and the peer with an anchor.
ALSO_EXPLORED = ("full | own 3", "SHiRA | self 3")
# The paper's granularities of HFT beside its categories, which in sequences have rates of their own for each task.
GRANULARITIES = ("HFT, layers", "HFT, model")
# Does the ranking hold with subwords and real text? On task A, with rates of its own, to choose by and to judge by in
# `STEPS`; exploratory.
OTHER_BASE, OTHER_SEEDS = "words-0", JUDGING_SEEDS[:3]
# A step of the grid below the lowest, which most have, since they learned with all five: what would it have changed?
# Where that was not tried while choosing: (task, bases, whose rates are those of the first); exploratory.
BELOW, BELOW_SEEDS = {FULL_RATES: 2e-5, LOW_RANK_RATES: 1e-4, SPARSE_RATES: 2e-4}, JUDGING_SEEDS[:2]
BELOW_ON = (("C", BASES), ("B", BASES), ("A", (OTHER_BASE,)))
# `make evidence`: task A, three seeds.
QUICK = ("full", "LoRA r=8", "HFT", "random rows", "full | self 1", "HFT | self 1", "replay")
QUICK_SEEDS = JUDGING_SEEDS[:3]
