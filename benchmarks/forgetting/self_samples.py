"""Of the anchor text that a base writes itself ("self"), how much is old prompts, and how much is right?

    python benchmarks/forgetting/self_samples.py

A sample is a *valid* old prompt if it begins with the tag of an ability, an input as that has it, and `=`; it is
*right* if the answer after it is the right one, to its end. Of facts a prompt is valid if the name is a known one.
Rows go to `results/self_samples.csv`: a row for each base, temperature and ability, and one for all of them, with the
shares of the samples in percent. Exploratory.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from abilities import ABILITIES, BOS, EOS, MIXTURE, Ability
from book import RESULTS, Row, commit, read, write
from learn import load
from pretrain import BASES
from protocol import BASES as NAMES

from peft_isolate import AnchorConfig
from peft_isolate.training import anchor_text

SAMPLES, SEED, TEMPERATURES = 1000, 0, (1.0, 0.7)
PATH, WORDS = RESULTS / "self_samples.csv", ("base", "ability", "commit")


def judged(text: str) -> tuple[Ability | None, bool]:
    """Of a sample without `<s>`, to its `</s>` if it has one: (whose prompt it begins with, if any; is it right)."""
    for ability in ABILITIES:
        if found := re.match(f"{ability.tag}({ability.form})=", text):
            return ability, text[found.end() :] == ability.answer(found[1]) + EOS
    return None, False


def samples(folder: Path, temperature: float, count: int, seed: int) -> list[str]:
    """What the base writes, as anchored training reads it."""
    model, tokenizer = load(folder, seed)
    config = AnchorConfig("self", temperature=temperature, batch_size=count, n_rows=count, max_length=16, seed=seed)
    batch = anchor_text(config, model, tokenizer).batch(0)  # of all: each row once
    written = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return ["".join(tokenizer.convert_ids_to_tokens(ids)).removeprefix(BOS) for ids in written]


def shares(texts: Sequence[str]) -> list[Row]:
    """For all abilities together and each one: how much of the samples, and of pretraining, is its; what is right."""
    found = [judged(text) for text in texts]
    percent = lambda count: round(100 * count / len(texts), 2)  # noqa: E731
    rows: list[Row] = []
    for ability in (None, *ABILITIES):
        mine = [right for whose, right in found if whose is not None and ability in (None, whose)]
        rows.append({
            "ability": ability.name if ability else "all", "valid": percent(len(mine)), "right": percent(sum(mine)),
            "pretrained": 100 * MIXTURE[ability] if ability else 100.0, "distinct": percent(len(set(texts))),
        })  # fmt: skip
    return rows


def ask(bases: Sequence[str] = NAMES, temperatures: Sequence[float] = TEMPERATURES) -> None:
    """Sample from each base at each temperature, where there are no rows yet."""
    rows, made_by = read(PATH, WORDS), commit()
    done = {(row["base"], row["temperature"]) for row in rows}
    for base, temperature in itertools.product(bases, temperatures):
        if (base, temperature) not in done:
            about = {"base": base, "temperature": temperature, "samples": SAMPLES, "seed": SEED}
            new = [about | row for row in shares(samples(BASES / base, temperature, SAMPLES, SEED))]
            rows += [row | {"commit": made_by} for row in new]
            write(PATH, rows)
            print(f"{base}, {temperature:g}: {new[0]['valid']} % valid, {new[0]['right']} % right", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=NAMES, help="folders of bases/")
    parser.add_argument("--temperatures", nargs="+", type=float, default=TEMPERATURES, help="of sampling")
    args = parser.parse_args()
    ask(args.bases, args.temperatures)


if __name__ == "__main__":
    main()
