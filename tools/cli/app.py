"""The commands' common ground: errors, exit codes, output, and the list of commands."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Final, NoReturn, TypeVar

import anyio
import typer
from rich.console import Console

from coase.protocol.errors import (
    BudgetExhausted,
    CoaseError,
    ConfigurationError,
    DealFailed,
    JournalFailed,
    WorldError,
)

EXIT_FAILED: Final = 1
"""The deal or the check failed, though everything was asked for rightly."""
EXIT_USER: Final = 2
"""The user's mistake: an argument, a file, a setting. Nothing was done."""
EXIT_UNAVAILABLE: Final = 69
"""Broker, chain or engine cannot be reached (EX_UNAVAILABLE)."""
EXIT_JOURNAL: Final = 70
"""The disk refused the journal; start again, nothing is lost."""
EXIT_INTERRUPTED: Final = 130

T = TypeVar("T")

app = typer.Typer(
    name="coase",
    help="Agents that find each other, negotiate, lock funds, work and settle.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"coase {importlib.metadata.version('coase')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what happens to standard error.")
    ] = False,
) -> None:
    level = logging.INFO if verbose else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def emit(document: Any) -> None:
    """Print one JSON document to standard output."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def exit_code(error: BaseException) -> int:
    """Return the exit code that says what kind of error it was."""
    match error:
        case JournalFailed():
            return EXIT_JOURNAL
        case DealFailed() | BudgetExhausted():
            return EXIT_FAILED
        case ConfigurationError():
            return EXIT_USER
        case WorldError():
            return EXIT_UNAVAILABLE
        case _:
            return EXIT_FAILED


def first_cause(error: BaseException) -> BaseException:
    """Return the first error of a group of them: what a person wants to read."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def perform(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``work`` to its end; turn its errors into one line and an exit code."""
    try:
        return anyio.run(work)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BaseExceptionGroup as group:
        cause = first_cause(group)
        if isinstance(cause, KeyboardInterrupt):
            raise typer.Exit(EXIT_INTERRUPTED) from None
        if not isinstance(cause, CoaseError):
            raise
        fail(cause)
    except CoaseError as error:
        fail(error)


def fail(error: BaseException) -> NoReturn:
    """Say what went wrong in one line, and exit with the code for it."""
    err.print(f"[bold red]coase:[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
    raise typer.Exit(exit_code(error))


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def run() -> None:
    """Load the commands and run the one that was asked for."""
    from . import (
        agent_command,
        buy_commands,
        demo_command,
        look_commands,
        model_command,
        up_command,
    )

    _ = (agent_command, buy_commands, demo_command, look_commands, model_command, up_command)
    try:
        app()
    except BrokenPipeError:
        # The reader went away, as `| head` does: not our error, and nothing to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
