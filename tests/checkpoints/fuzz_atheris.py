"""Fuzzing with atheris, which mutates what reaches new code: `python tests/checkpoints/fuzz_atheris.py --runs N`.

What libFuzzer mutates is a script of alterations, behind one byte that says which decoder's file they are done to. A
finding ends the run with another exit status than 0, and prints the script.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import struct
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import atheris

with atheris.instrument_imports(include=["peft_isolate"]):
    import torch

    from tests.checkpoints.alterations import Script
    from tests.checkpoints.fuzz_files import IN_FILES
    from tests.checkpoints.fuzzing import COUNTS, IN_MEMORY, SECONDS, bounded_memory, scratch

TARGETS = (*IN_MEMORY, *IN_FILES)
STEP = struct.Struct("<III")
LONGEST = 1 + 4 * STEP.size


def script_of(data: bytes) -> Script:
    """The steps that libFuzzer's bytes stand for."""
    return [STEP.unpack_from(data, at) for at in range(1, len(data) - STEP.size + 1, STEP.size)]


def one(data: bytes) -> None:
    """One altered file."""
    script = script_of(data)
    try:
        TARGETS[data[0] % len(TARGETS) if data else 0].decode(script)
    except BaseException:
        print("the script was", script, file=sys.stderr, flush=True)
        raise


def main() -> None:
    """Run that many, and say how many were answered and refused, by decoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000, help="altered files")
    parser.add_argument("--seed", type=int, default=0, help="of libFuzzer; 0 draws one")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = scratch() / "corpus"
    folder.mkdir()
    generator = random.Random(asked.seed)
    for i, target in enumerate(TARGETS):
        target.decode([])  # its sound files, made before the memory is bounded
        for steps in (1, 2, 4):
            (folder / f"{target.name}-{steps}").write_bytes(bytes([i]) + generator.randbytes(steps * STEP.size))
    COUNTS.clear()

    def counted(data: bytes) -> None:
        one(data)
        if COUNTS.total() == asked.runs:
            for target in TARGETS:
                print(f"{target.name}: {COUNTS[target.name, True]} answered, {COUNTS[target.name, False]} refused")
            print(f"{asked.runs} altered files", flush=True)
            shutil.rmtree(scratch())
            # libFuzzer would end the process without a word.
            os._exit(0)

    options = [
        f"-seed={asked.seed}", f"-max_len={LONGEST}", "-len_control=0", f"-timeout={SECONDS}", "-rss_limit_mb=0",
        "-verbosity=0", f"-artifact_prefix={folder}/found-", str(folder),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], counted)
    with bounded_memory():
        atheris.Fuzz()


if __name__ == "__main__":
    main()
