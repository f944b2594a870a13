"""CoFiTune's search on task A with the first base: which layers, which modules?

    python benchmarks/forgetting/search.py

A trial trains as long as the paper's region takes to learn the task, at its rate. Its speciality is the new task's
exact match, its versatility the mean of the old abilities', both of the validation split. The trials are in
`results/search.csv`; stopped, the search goes on, and where they are there nothing is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abilities import TASKS
from bases import folder_of, rendered
from book import RESULTS, commit, quiet, write
from choices import rate_of
from evidence import BOOK
from learn import Exam, load
from peft import get_peft_model
from protocol import CHOOSING_SEEDS, DEVELOPED_ON, TRAINED
from stages import train
from torch import nn

from peft_isolate import CoFiTuneConfig, search_region

PATH = RESULTS / "search.csv"
TRIALS = Path("outputs") / "forgetting" / "search"
(BASE, TASK), SEED = DEVELOPED_ON, CHOOSING_SEEDS[0]
STEPS = 220


def main() -> None:
    if PATH.exists():
        print(f"{PATH.name} is there: delete it to search again")
        return
    quiet()
    rate = rate_of(BOOK.rows(), "CoFiTune, no mask", TASK)
    if rate is None:
        raise SystemExit("error: the rates of the paper's region are not there yet: run evidence.py --full first")
    _, tokenizer = load(folder_of(BASE), SEED)
    rows = rendered(BASE, TASKS[TASK].rows("train", TRAINED, seed=SEED))
    exam = Exam(BASE, [TASK], False, tokenizer)

    def learned(config: CoFiTuneConfig) -> nn.Module:
        model = get_peft_model(load(folder_of(BASE), SEED)[0], config)
        train(model, tokenizer, rows, STEPS, rate, SEED)
        return model

    def score(model: nn.Module) -> dict[str, float]:
        scores = exam(model)
        return {"speciality": scores[TASK], "versatility": scores["old"]}

    config = CoFiTuneConfig(soft_mask=None, task_type="CAUSAL_LM")
    result = search_region(learned, score, output=TRIALS, config=config, progress=False)
    print(result)
    made_by = commit()
    trials: list[dict[str, Any]] = [
        {"level": trial.level, "layers": trial.range_name, "modules": trial.modules_name,
         "speciality": trial.speciality, "versatility": trial.versatility, "unified": trial.unified}
        for trial in result.trials
    ]  # fmt: skip
    write(PATH, [trial | {"rate": rate, "steps": STEPS, "seed": SEED, "commit": made_by} for trial in trials])


if __name__ == "__main__":
    main()
