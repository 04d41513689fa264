"""The commands' common ground: errors, exit codes, output, and the list of commands.

Nothing heavy is imported here or at the top of any command: ``coase --help`` must be quick.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeVar

import typer
from rich.console import Console
from typer.models import CommandInfo, TyperInfo

from coase.protocol.errors import (
    BudgetExhausted,
    ChainUnavailable,
    CoaseError,
    ConfigurationError,
    DealFailed,
    JournalFailed,
    TransportUnavailable,
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
EXIT_PIPE: Final = 128 + signal.SIGPIPE
"""The reader of our output went away, as ``| head`` does; what a killed program would show."""
PIPED_WIDTH: Final = 120  # Of tables that go into a file or a pipe, where nobody says how wide.

OTHERS: Final = "Others"
PANELS: Final = {
    "Begin": "demo up status doctor model",
    "Several machines": "join leave lan firm",
    "Buy": "ask hire plan gateway explain",
    "Sell": "sell agent",
    "Money": "wallet budget withdraw export audit keys",
    "Trust": "replay dispute arbiter panel keeper identity reputation",
    "Chains": "deploy",
}
"""The commands as people look for them."""

T = TypeVar("T")


class _Screen(Console):
    """A console that ends the program cleanly when its reader goes away."""

    ends_program = False

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, but nothing in a text that would command the terminal: it may be a stranger's."""
        clean = (printable(each) if isinstance(each, str) else each for each in objects)
        super().print(*clean, **options)

    def on_broken_pipe(self) -> None:
        """Say no more; if this was the output that mattered, stop as for Ctrl-C."""
        self.quiet = True
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())
        if not self.ends_program:
            return
        _Ending.number = signal.SIGPIPE
        if _Ending.cancel is None:
            sys.exit(EXIT_PIPE)
        _Ending.cancel()


class _Ending:
    """Why the work is ended before its time, and how to end it."""

    number: int = signal.SIGINT
    cancel: Callable[[], object] | None = None

    @classmethod
    def exit_code(cls) -> int:
        """Return the exit code of a program that was told to end: as if the signal had done it."""
        return 128 + cls.number


def _console(*, stderr: bool) -> _Screen:
    stream = sys.stderr if stderr else sys.stdout
    sized = stream.isatty() or "COLUMNS" in os.environ
    return _Screen(stderr=stderr, width=None if sized else PIPED_WIDTH)


app = typer.Typer(
    name="coase",
    help="Agents that find each other, negotiate, lock funds, work and settle."
    " Begin with [b]coase demo[/b], or with [b]coase up[/b] and a second terminal.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out = _console(stderr=False)
out.ends_program = True
err = _console(stderr=True)

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


def printable(text: str) -> str:
    """Return a stranger's text without what would command the terminal, or turn its lines round."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def json_text(document: Any, *, indent: int | None = 2) -> str:
    """Return JSON in which all that is not for the eye is spelt ``\\uXXXX``."""
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    if text.isprintable():
        return text
    # The line ends of the layout are no part of any string: those are spelt out already.
    return "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text)


def emit(document: Any, *, indent: int | None = 2) -> None:
    """Print one JSON document to standard output."""
    sys.stdout.write(json_text(document, indent=indent) + "\n")
    sys.stdout.flush()


def show_json(document: Any) -> None:
    """Print JSON for people: coloured where there are colours."""
    from rich.highlighter import JSONHighlighter

    out.print(JSONHighlighter()(json_text(document)), soft_wrap=True)


def say(text: str, *, style: str = "dim") -> None:
    """Tell the person at the terminal something, on standard error."""
    err.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


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
    """Run ``work`` to its end; turn its errors into one line and an exit code.

    To be told to end (SIGTERM), or to lose the terminal (SIGHUP), is like Ctrl-C: whatever was
    begun is put away first.
    """
    import asyncio

    import anyio

    try:
        return anyio.run(_guarded, work)
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise typer.Exit(_Ending.exit_code()) from None
    except BrokenPipeError:
        raise
    except BaseExceptionGroup as group:
        cause = first_cause(group)
        if isinstance(cause, KeyboardInterrupt):
            raise typer.Exit(_Ending.exit_code()) from None
        if not isinstance(cause, CoaseError | OSError | typer.Exit):
            raise
        fail(cause)
    except (CoaseError, OSError) as error:
        fail(error)
    finally:
        _Ending.cancel = None


async def _guarded(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``work`` so that signals cancel it; Ctrl-C is the event loop's own."""
    import asyncio

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def end(number: int) -> None:
        _Ending.number = number
        task.cancel()

    _Ending.cancel = task.cancel
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # Else it is ignored, as by nohup.
            loop.add_signal_handler(number, end, number)
    return await work()


def fail(error: BaseException) -> NoReturn:
    """Say what went wrong in one line, and exit with the code for it."""
    if isinstance(error, typer.Exit):
        raise error
    code = EXIT_UNAVAILABLE if isinstance(error, OSError) else exit_code(error)
    # Where no deal came about, it is no news that one ended.
    text = error.why if isinstance(error, DealFailed) and not error.deal_id else str(error)
    if isinstance(error, ChainUnavailable | TransportUnavailable):
        text = _ended_network() or text
    err.print(f"[bold red]coase:[/] {_plain(text)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def raise_user(text: str) -> NoReturn:
    """End the command with a line for its user and the exit code for user's mistakes."""
    fail(ConfigurationError(text))


def _ended_network() -> str:
    """Return what to do if our own network does not run any more, else nothing."""
    from .scratch import alive
    from .up_command import known_network, starts_again

    network = known_network()
    if network is None or not network.pid or alive(network.pid):
        return ""
    again = starts_again(network)
    return f"the network has ended (process {network.pid}); start it again with: {again}"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def load() -> None:
    """Load the commands into ``app``, in the order in which they are shown. Safe to repeat."""
    for module in sorted(Path(__file__).parent.glob("*_command*.py")):
        import_module(f"{__package__}.{module.stem}")
    place = {name: (panel, number) for panel, number, name in _places()}
    shown: list[CommandInfo | TyperInfo] = [*app.registered_commands, *app.registered_groups]
    for entry in shown:
        entry.rich_help_panel, _ = place.get(_name_of(entry), (OTHERS, 0))
    last = (OTHERS, len(place))
    app.registered_commands.sort(key=lambda entry: place.get(_name_of(entry), last)[1])
    app.registered_groups.sort(key=lambda entry: place.get(_name_of(entry), last)[1])


def _places() -> Iterator[tuple[str, int, str]]:
    number = 0
    for panel, names in PANELS.items():
        for name in names.split():
            number += 1
            yield panel, number, name


def _name_of(entry: CommandInfo | TyperInfo) -> str:
    if isinstance(entry, TyperInfo):
        named = entry.name if isinstance(entry.name, str) else None
        inner = entry.typer_instance.info.name if entry.typer_instance is not None else None
        return named or (inner if isinstance(inner, str) else "")
    callback = entry.callback
    return entry.name or (callback.__name__ if callback is not None else "")


def run() -> None:
    """Run the command that was asked for."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # A terminal that lacks a letter shows a question mark.
            stream.reconfigure(errors="replace")
    load()
    try:
        app()
    except BrokenPipeError:
        # The reader went away, as `| head` does: not our error, and nothing to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_PIPE)
