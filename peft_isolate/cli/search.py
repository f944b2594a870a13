"""`peft-isolate search`: CoFiTune's search for the region of a model, from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def search(
    config: Annotated[Path, typer.Option(help="A YAML file, see above.")],
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what failed earlier.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Read and check everything, train nothing.")] = False,
) -> None:
    """Find the layers and modules to train, by some twelve short trainings.

    Writes trials.jsonl as trials finish, and result.json and tree.png at the end. Started again, it goes on where it
    stopped. Paths are relative to the folder where the command runs.

    \b
    Example: peft-isolate search --config search.yaml, where search.yaml is
      base: Qwen/Qwen3-0.6B              # folder or Hub id
      data: task.jsonl                   # "text", "prompt" and "completion", or "messages"
      output: search                     # folder
      training: {learning_rate: 4.0e-5, max_steps: 200, max_length: 512}  # as trl.SFTConfig
      speciality: {type: exact_match, data: task-test.jsonl, max_new_tokens: 32}
      versatility:
        - {type: held_out_loss, data: general.jsonl, probability: true}
        - {type: lm_eval, tasks: [hellaswag], limit: 200}
    \b
    Optional:
      config: {exclude_modules: [...]}   # other fields of CoFiTuneConfig
      metric: unified                    # or speciality, versatility
      min_speciality: 0.9                # with full_speciality: a share of full fine-tuning's score
      full_speciality: 0.7
      levels: [{name: all, ranges: [bottom, top], modules: [MHA, FFN]}]
      workers: 1                         # processes side by side
    """
    from .search_run import check_all, run

    wanted = check_all(config)
    for note in wanted.notes:
        typer.echo(f"note: {note}", err=True)
    if check:
        typer.echo(f"{config} is sound: base {wanted.trial.base}, scores {wanted.score}")
        return
    typer.echo(str(run(wanted, retry_failed)))
    typer.echo(f"saved to {wanted.output}")
