"""`peft-isolate isolate`: the whole of CPI-FT or DPI, from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def isolate(
    config: Annotated[Path, typer.Option(help="A YAML file, see above.")],
    check: Annotated[bool, typer.Option("--check", help="Read and check everything, train nothing.")] = False,
) -> None:
    """Train one adapter for several tasks that keeps every one of them: CPI-FT, or DPI with 'fuse: false'.

    Probes, core regions, groups, stages, fusion: every step is kept in the output folder. Started again, it goes on
    after the last finished step. Paths are relative to the folder where the command runs.

    \b
    Example: peft-isolate isolate --config run.yaml, where run.yaml is
      base: Qwen/Qwen3-0.6B              # folder or Hub id
      output: run                        # folder
      tasks:                             # "prompt" and "completion", "text", or "messages", alike in all
        code: code.jsonl                 # 5 % are held out to score on
        chat: {train: chat.jsonl, test: chat-test.jsonl}
        math:
          train: {dataset: openai/gsm8k, name: main, split: train, fields: {prompt: question, completion: answer}}
      sft: {learning_rate: 2.0e-5, num_train_epochs: 1, max_length: 1024}  # as trl.SFTConfig
    \b
    Optional, here with what holds without them:
      probe_sft: {}                      # arguments that are others for the probes
      probe_config: {method: core_isolation}  # or lora, with its fields
      probes: {}                         # task: folder of an adapter or checkpoint tuned elsewhere
      percent: 1.0                       # of the scalars in scope are a task's core
      scope: global                      # or tensor
      score: update                      # or gradient: no probes, so with 'fuse: false' or 'probes'
      include_embeddings: false
      threshold: 0.1                     # Jaccard that links two tasks; null: each alone
      order: null                        # names of the tasks; null: groups are shuffled
      seed: 0
      fuse: true                         # false: DPI
      elsewhere: slerp                   # or linear, keep
      slerp_on: weights                  # or delta
      omega: null                        # how far fusion goes towards each probe, 0 to 1
      epsilon: 0.0005                    # fusion is linear where |cos| is above 1 less this
      stage_data: full                   # of the first pass over the groups; or sample
      sample: null                       # rows of each task after fusion; null: a tenth of the smallest, or 1,000
      probe_rows: null                   # null: a tenth, or 1,000 if that is more
      freeze_all_cores: false            # after fusion, freeze the cores of all tasks in every stage
      save_dtype: null                   # or bfloat16
      exact_match: true                  # false: score losses alone
      merge: false                       # write the merged model, too
    """
    from .isolate_run import read_run

    run = read_run(config)
    if check:
        for note in run.check():
            typer.echo(f"note: {note}", err=True)
        typer.echo(f"{config} is sound: base {run.base}, {len(run.tasks)} tasks")
        return
    result = run.run()
    typer.echo(str(result))
    typer.echo(f"saved to {result.final}; {result.folder / 'report.md'} has the rest")
