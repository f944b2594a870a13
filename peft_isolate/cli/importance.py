"""`peft-isolate importance`: how much every output unit matters on some data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def importance(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model: a folder or a Hub id.")],
    data: Annotated[
        Path, typer.Argument(metavar="DATA.JSONL", help='Rows with "text", "prompt" and "completion", or "messages".')
    ],
    output: Annotated[Path, typer.Option(help="Write it to this file.")] = Path("importance.safetensors"),
    plot: Annotated[Path | None, typer.Option(help="Draw layers × units into this picture.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a batch.")] = 8,
    max_batches: Annotated[int | None, typer.Option(help="Stop after so many.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens a row; longer rows lose their end.")] = 512,
    method: Annotated[
        Literal["absolute", "signed"],
        typer.Option(help="Sum |gradient|; or, as the released code does, gradients: batches may cancel."),
    ] = "absolute",
    dropout: Annotated[float, typer.Option(help="Its probability in the two passes that are compared.")] = 0.003,
    seed: Annotated[int, typer.Option(help="Of the dropout.")] = 0,
    heads: Annotated[bool, typer.Option(help="Measure attention heads, too.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; by default a GPU where there is one.")] = None,
) -> None:
    """Measure how much each output unit matters to what a model does on some data (CoFiTune's soft mask).

    \b
    Examples:
      peft-isolate importance Qwen/Qwen3-0.6B general.jsonl --output importance.safetensors
      peft-isolate importance ./base general.jsonl --max-batches 100 --plot importance.png
    """
    from functools import partial

    from torch.utils.data import DataLoader

    from ..errors import IsolateError
    from ..evaluation.rows import collate, encode, pad_id, positive, read_rows
    from ..methods.cofitune.importance import measure_importance
    from ..methods.cofitune.importance.importance import check_arguments
    from ..regions.plots import picture_format
    from .read import find_device, load_model, load_tokenizer

    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        positive(name, value)
    check_arguments(method, dropout, seed, max_batches)
    for path in (output, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise IsolateError(f"there is no folder {str(path.parent)!r} to write {path.name!r} to")
        if path is not None and path.is_dir():
            raise IsolateError(f"{str(path)!r} is a folder: name a file in it")
    if plot is not None:
        if plot.absolute() == output.absolute():
            raise IsolateError(f"--output and --plot are both {str(plot)!r}: the picture would replace the importance")
        picture_format(plot)
    target = find_device(device)
    # The data first: to load a model for a misspelt file takes minutes.
    rows = read_rows(data, None if max_batches is None else max_batches * batch_size)
    tokenizer = load_tokenizer(base)
    encoded = [row for row in encode(rows, tokenizer, max_length) if row.ids]
    collated = partial(collate, pad=pad_id(tokenizer))
    loader: DataLoader = DataLoader(encoded, batch_size, collate_fn=collated)  # type: ignore[arg-type]
    measured = measure_importance(
        load_model(base, target),
        loader,
        method=method,
        dropout=dropout,
        seed=seed,
        max_batches=max_batches,
        heads=heads,
    )
    measured.save(output)
    if plot is not None:
        measured.plot(plot)
    typer.echo(f"{measured!r}\nsaved to {output}" + (f", drawn in {plot}" if plot else ""))
