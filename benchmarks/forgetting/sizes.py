"""How many bytes each method's file has, as it would be saved and shared: `python benchmarks/forgetting/sizes.py`.

Of a method with an adapter that is the adapter: numbers in fp32, and where in the base they belong; of the others all
weights. Nothing is trained for it. Rows go to `results/sizes.csv`.
"""

from __future__ import annotations

from abilities import TASKS
from arms import METHODS
from bases import folder_of, rendered
from book import RESULTS, Row, commit, quiet, write
from learn import load
from measure import Questions, file_size
from peft import get_peft_model
from protocol import DEVELOPED_ON

from peft_isolate import next_round

PATH = RESULTS / "sizes.csv"


def size(name: str, base: str, task: str, seed: int = 0) -> int:
    """Bytes of what a method saves on a base, having learned a task."""
    method = METHODS[name]
    model, tokenizer = load(folder_of(base), seed)
    config = method.make(model, seed, Questions(rendered(base, TASKS[task].rows("train", 128)), tokenizer).batches)
    if config is None:
        return file_size(model, adapter=False)
    model = get_peft_model(model, config)
    for _ in range(method.rounds - 1):
        next_round(model)
    return file_size(model, adapter=True)


def main() -> None:
    quiet()
    base, task = DEVELOPED_ON
    made_by, rows = commit(), list[Row]()
    for name in METHODS:
        rows.append({"base": base, "arm": name, "bytes": size(name, base, task), "commit": made_by})
        print(f"{name}: {rows[-1]['bytes']:,}", flush=True)
    write(PATH, rows)


if __name__ == "__main__":
    main()
