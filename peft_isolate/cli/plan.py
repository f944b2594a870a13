"""`peft-isolate plan`: what a config would train, or an adapter trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def plan(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model: a folder or a Hub id.")],
    config: Annotated[
        str,
        typer.Option(
            help="A method's name, a YAML file (method: cofitune, and its fields), or an adapter's folder: ./adapter."
        ),
    ],
    plot: Annotated[Path | None, typer.Option(help="Draw layers × roles into this picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Show what a config would train on a model, its bytes and its training memory. No weights are read.

    \b
    Examples:
      peft-isolate plan Qwen/Qwen3-0.6B --config cofitune
      peft-isolate plan ./base --config cofitune.yaml --plot trained.png
      peft-isolate plan ./base --config ./adapter --json
    """
    from ..checkpoints.adapter import Adapter
    from ..checkpoints.architecture import meta_model
    from ..methods.plan import plan as make_plan
    from .read import read_config

    if plot is not None:
        from ..regions.plots import picture_format

        picture_format(plot)
    wanted, model = read_config(config), meta_model(base)
    if getattr(wanted, "resolved", None) is not None:  # of an adapter that was saved
        adapter = Adapter(config)
        adapter.resolve(model)
        adapter.learn_positions()
        wanted = adapter.config
    table = make_plan(model, wanted)
    if plot is not None:
        table.plot(plot)
    typer.echo(json.dumps(as_plain(table), indent=1) if as_json else str(table))


def as_plain(table: Any) -> dict[str, Any]:
    """A `Plan` as JSON can hold it."""
    return {
        "trained": table.trained,
        "held": table.held.count,
        "total": table.total,
        "share": table.share,
        "base_bytes": table.base_bytes,
        "adapter_bytes": table.adapter_bytes,
        "training_bytes": table.training_bytes,
        "outside_bytes": table.outside_bytes,
        "remarks": list(table.remarks),
        "parameters": [
            {
                "parameter": row.parameter,
                "role": row.role,
                "layer": row.layer,
                "expert": row.expert,
                "selection": None if row.selection is None else row.selection.kind,
                "scalars": row.scalars,
                "trained": row.trained,
            }
            for row in table.rows
        ],
    }
