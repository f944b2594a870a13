"""The app: its commands, and what a user's mistake looks like. What a command needs is imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import _version
from ..errors import IsolateError
from .checkpoints import COMMANDS
from .importance import importance
from .isolate import isolate
from .plan import plan
from .search import search


class Commands(TyperGroup):
    """A user's mistake ends a command with one line and exit code 1; any other exception keeps its traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; `standalone_mode=False` raises instead of ending the process."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            if not standalone_mode or not is_users(error):
                raise
            # Those of the parser know how they are written.
            shown = error.format_message() if hasattr(error, "format_message") else str(error)
            print("error: " + (" ".join(shown.split()) or type(error).__name__), file=sys.stderr)
            code = 1
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def is_users(error: Exception) -> bool:
    """Whether an exception tells of a mistake of the user's: an argument, a file, a package that is missing."""
    if isinstance(error, typer.Abort) or hasattr(error, "format_message"):
        return True
    if isinstance(error, ImportError):
        # Those that say what to install; one that just happens is a mistake of ours.
        return "pip install" in str(error)
    return isinstance(error, IsolateError | OSError)


app = typer.Typer(
    name="peft-isolate", cls=Commands, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


def _version_and_exit(wanted: bool) -> None:
    if wanted:
        typer.echo(_version.__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version_and_exit, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fine-tune a chosen region of a model and nothing else.

    \b
    Examples:
      peft-isolate plan Qwen/Qwen3-0.6B --config cofitune
      peft-isolate importance Qwen/Qwen3-0.6B general.jsonl --output importance.safetensors
      peft-isolate search --config search.yaml
      peft-isolate isolate --config run.yaml
      peft-isolate extract ./base ./tuned --out ./adapter
      peft-isolate merge ./base ./adapter --out ./merged
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command in (plan, importance, search, isolate, *COMMANDS):
    app.command()(_command)


def main() -> None:
    """Run the command line of this process."""
    app()
