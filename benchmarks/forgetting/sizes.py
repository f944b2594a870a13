"""How many bytes each method's file has, as it would be saved and shared: `python benchmarks/forgetting/sizes.py`.

Of a method with an adapter that is the adapter: numbers in fp32, and where in the base they belong; of the others all
weights. Nothing is trained for it. Rows go to `results/sizes.csv`; those that are there stay.
"""

from __future__ import annotations

from abilities import TASKS
from arms import METHODS
from bases import folder_of, rendered
from book import RESULTS, commit, quiet, read, write
from learn import load, wrapped
from measure import file_size
from peft import PeftModel
from protocol import DEVELOPED_ON

from peft_isolate import next_round

PATH, WORDS = RESULTS / "sizes.csv", ("base", "arm", "commit")


def size(name: str, base: str, task: str, seed: int = 0) -> int:
    """Bytes of what a method saves on a base, having learned a task."""
    method = METHODS[name]
    model, tokenizer = load(folder_of(base), seed)
    model = wrapped(model, method, seed, rendered(base, TASKS[task].rows("train", 128)), tokenizer)
    for _ in range(method.rounds - 1):
        next_round(model)
    return file_size(model, adapter=isinstance(model, PeftModel))


def main() -> None:
    quiet()
    base, task = DEVELOPED_ON
    made_by, kept = commit(), [row for row in read(PATH, WORDS) if row["arm"] in METHODS]
    rows = [row | {"bytes": int(row["bytes"])} for row in kept]
    done = {row["arm"] for row in rows}
    for name in [name for name in METHODS if name not in done]:
        rows.append({"base": base, "arm": name, "bytes": size(name, base, task), "commit": made_by})
        print(f"{name}: {rows[-1]['bytes']:,}", flush=True)
    order = list(METHODS)
    write(PATH, sorted(rows, key=lambda row: order.index(row["arm"])))


if __name__ == "__main__":
    main()
