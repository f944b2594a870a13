"""The commands on adapters and checkpoints: each a thin shell over the function of its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import IsolateError

Base = Annotated[str, typer.Argument(metavar="BASE", help="The base model: a folder or a Hub id.")]
Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter: a folder or a Hub id.")]
Difference = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="An adapter, or an exact difference: a folder or a Hub id.")
]
Out = Annotated[Path, typer.Option(help="A new folder.")]
Revision = Annotated[str | None, typer.Option(help="Of the base on the Hub: branch, tag or commit.")]


def extract(
    base: Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="A model that was fine-tuned from it: likewise.")],
    out: Out,
    mode: Annotated[
        Literal["region", "top", "exact"],
        typer.Option(help="An adapter on all that changed; on the scalars that moved most; or the exact difference."),
    ] = "region",
    percent: Annotated[float | None, typer.Option(help="For top: of the scalars; by default 1.")] = None,
    embeddings: Annotated[
        bool | None, typer.Option(help="Whether embeddings and head are in scope; by default not for top.")
    ] = None,
    revision: Revision = None,
    tuned_revision: Annotated[str | None, typer.Option(help="Of the tuned model on the Hub.")] = None,
) -> None:
    """Make a small adapter, or an exact difference, of two checkpoints.

    \b
    Examples:
      peft-isolate extract ./base ./tuned --out ./adapter
      peft-isolate extract ./base ./tuned --out ./top --mode top --percent 1
      peft-isolate extract ./base ./tuned --out ./exact --mode exact
    """
    from ..checkpoints.extract import extract as run

    if percent is not None and mode != "top":
        raise IsolateError(f"--percent {percent:g} goes with --mode top, and the mode is {mode!r}")
    typer.echo(
        run(
            base, tuned, out, mode, percent=1.0 if percent is None else percent, include_embeddings=embeddings,
            revision=revision, tuned_revision=tuned_revision,
        )
    )  # fmt: skip


def merge(
    base: Base,
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="One or several, or an exact difference.")
    ],
    out: Out,
    scale: Annotated[
        list[float] | None, typer.Option(help="α in W0 + α·Δ: once for all adapters, or once for each.")
    ] = None,
    revision: Revision = None,
) -> None:
    """Write the model that a base and its adapters are together, laid out as the base.

    \b
    Examples:
      peft-isolate merge ./base ./adapter --out ./merged
      peft-isolate merge ./base ./first ./second --scale 1 --scale 0.5 --out ./merged
    """
    from ..checkpoints.merge import merge as run

    scales = scale or [1.0]
    typer.echo(run(base, *adapters, out=out, scale=scales[0] if len(scales) == 1 else scales, revision=revision))


def compress(
    adapter: Adapter,
    out: Out,
    values: Annotated[
        Literal["bf16", "fp16", "int8", "exact"], typer.Option(help="What the numbers become.")
    ] = "bf16",
    zstd: Annotated[bool, typer.Option(help="Compress what becomes shorter by it.")] = True,
    base: Annotated[
        str | None,
        typer.Option(help="The base, to count which effective weights change; by default the adapter's own."),
    ] = None,
) -> None:
    """Write an adapter as small as it can be shared, for inference.

    \b
    Examples:
      peft-isolate compress ./adapter --out ./small
      peft-isolate compress ./adapter --out ./smaller --values int8
    """
    from ..checkpoints.compress import compress as run

    typer.echo(run(adapter, out, values, zstd, base))


def decompress(adapter: Adapter, out: Out) -> None:
    """Write a compressed adapter as one that can be trained on.

    \b
    Examples:
      peft-isolate decompress ./small --out ./adapter
    """
    from ..checkpoints.compress import decompress as run

    run(adapter, out)
    typer.echo(f"decompressed: {out}")


def verify(
    base: Base,
    adapter: Difference,
    merged: Annotated[
        str | None, typer.Option(help="A checkpoint that shall be both together: is every other bit the base's?")
    ] = None,
    revision: Revision = None,
) -> None:
    """Check an adapter: right base? finite? indices sound? unaltered?

    \b
    Examples:
      peft-isolate verify ./base ./adapter
      peft-isolate verify ./base ./adapter --merged ./merged
    """
    from ..checkpoints.verify import verify as run

    typer.echo(run(base, adapter, merged, revision))


def inspect(
    adapter: Difference,
    base: Annotated[str | None, typer.Option(help="The base, for roles; by default the adapter's own.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw |Δ| over layers × roles into this picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Write the adapter's model card, README.md, anew.")] = False,
) -> None:
    """Show what an adapter is: method, region, counts, bytes, base, training.

    \b
    Examples:
      peft-isolate inspect ./adapter
      peft-isolate inspect ./adapter --plot delta.png
      peft-isolate inspect ./adapter --json
    """
    from ..checkpoints.inspect import inspect as run
    from ..checkpoints.inspect import write_card
    from ..regions.plots import picture_format

    if plot is not None:
        picture_format(plot)
    found = run(adapter, base)
    if plot is not None:
        found.plot(plot)
    if plot is not None:
        typer.echo(f"drawn: {plot}", err=True)
    if card and write_card(adapter, base):
        typer.echo(f"written: {Path(adapter) / 'README.md'}", err=True)
    typer.echo(json.dumps(found.as_plain(), indent=1) if as_json else str(found))


def export(
    base: Base,
    adapter: Difference,
    out: Out,
    format: Annotated[
        Literal["state-dict", "indexed"],
        typer.Option(help="Changed tensors whole; or of each the indices and values that changed."),
    ] = "state-dict",
    scale: Annotated[float, typer.Option(help="α in W0 + α·Δ.")] = 1.0,
    revision: Revision = None,
) -> None:
    """Write what an adapter changes as plain safetensors, for those without the plugin.

    \b
    Examples:
      peft-isolate export ./base ./adapter --out ./changed
      peft-isolate export ./base ./adapter --out ./changed --format indexed
    """
    from ..checkpoints.export import export as run

    typer.echo(run(base, adapter, out, format, scale=scale, revision=revision))


COMMANDS = (extract, merge, compress, decompress, verify, inspect, export)
