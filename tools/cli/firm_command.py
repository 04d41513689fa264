"""``coase firm``: agents that trust each other, and work for each other without a price."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.table import Table

from coase.protocol.errors import ConfigurationError

from .app import Json, app, emit, err, out, perform, say

if TYPE_CHECKING:
    from coase.agents.firm import Firm

CODE_MAX_CHARS: Final = 1_000

firm = typer.Typer(
    help="Your own machines, or your company's: inside work is given, outside it is bought.",
    no_args_is_help=True,
)
app.add_typer(firm, name="firm")

Address = Annotated[str, typer.Argument(help="An agent's address.")]


@dataclass(slots=True)
class _Use:
    """What one agent did for another within the firm, as far as it is journalled here."""

    agent: str
    counterparty: str
    side: str
    deals: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def row(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@firm.command()
def create(
    name: Annotated[str, typer.Argument(help="What you call it.")] = "home",
    json_: Json = False,
) -> None:
    """Make a firm, and print the code with which other machines join it.

    Who has the code has your machines' work for nothing: show it to nobody else.

    Example: [b]coase firm create office[/b]
    """

    async def work() -> Firm:
        from coase.agents.firm import FirmFile, new_firm

        file = FirmFile()
        _require_none(file.read())
        made = new_firm(name)
        file.write(made)
        return made

    made = perform(work)
    code_ = _code(made)
    if json_:
        emit({**_told(made), "code": code_})
        return
    say(f"the firm {made.name!r} is made; on each other machine of it:")
    out.print(f"coase firm join {code_}", soft_wrap=True, highlight=False)


@firm.command(name="join")
def join_firm(
    code: Annotated[str, typer.Argument(help="Its code; - reads it from standard input.")] = "-",
    name: Annotated[str, typer.Option(help="What you call it here.")] = "home",
    json_: Json = False,
) -> None:
    """Join the firm whose code another machine printed.

    What runs already takes it up with its next request; nothing has to be started again.

    Example: [b]coase firm join[/b] and then the code, which no list of processes shows that way
    """
    if code == "-" and sys.stdin.isatty():
        say("the code, please:")
    text = sys.stdin.readline(CODE_MAX_CHARS) if code == "-" else code

    async def work() -> Firm:
        from coase.agents.firm import FirmFile, joined_firm

        file = FirmFile()
        made = joined_firm(text, name)
        known = file.read()
        if known is not None and known.code != made.code:
            _require_none(known)
        file.write(known or made)
        return known or made

    made = perform(work)
    if json_:
        emit(_told(made))
    else:
        say(f"joined {made.name!r}: its agents work for yours without a price, and yours for its")


@firm.command(name="list")
def list_firm(json_: Json = False) -> None:
    """Show the firm, and who did how much for whom, as far as this machine journalled it.

    Example: [b]coase firm list[/b]
    """

    async def work() -> tuple[Firm | None, list[_Use]]:
        from coase.agents.firm import FirmFile

        return FirmFile().read(), _uses()

    known, uses = perform(work)
    if json_:
        told = _told(known) if known is not None else None
        emit({"firm": told, "used": [use.row() for use in uses]})
        return
    if known is None:
        out.print("no firm: make one with: coase firm create NAME", soft_wrap=True)
    else:
        listed = ", ".join(f"{label} {key}" for key, label in known.keys) or "no listed keys"
        joined = "joined by its code" if known.code is not None else "without a code"
        out.print(f"{known.name}: {joined}; {listed}", soft_wrap=True, markup=False)
    if uses:
        _print(uses)


@firm.command()
def leave(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Leave the firm: from the next request on everything is bought and sold again.

    The others stay: to keep somebody out who knows the code, make a new firm and join that.
    """

    async def work() -> str:
        from coase.agents.firm import FirmFile

        file = FirmFile()
        known = file.current()
        if known is None and not file.path.exists():
            raise ConfigurationError("there is no firm to leave")
        name = known.name if known is not None else str(file.path)
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigurationError("nobody to ask; say --yes")
            typer.confirm(f"Leave {name!r}?", abort=True, err=True)
        file.forget()
        return name

    say(f"left {perform(work)!r}")


@firm.command()
def add(
    address: Address,
    name: Annotated[str, typer.Option(help="Whose it is, for people.")] = "",
) -> None:
    """Put one agent on the list: it is of the firm without knowing the code.

    It has to list your agents, or to have the code, to take anything without a price.
    """
    _change(address, name or "listed")


@firm.command()
def remove(address: Address) -> None:
    """Take one agent off the list."""
    _change(address, "")


@firm.command()
def code() -> None:
    """Print the firm's code again. Show it to nobody who is not of the firm."""

    async def work() -> str:
        from coase.agents.firm import FirmFile

        return _code(_require(FirmFile().read()))

    out.print(perform(work), highlight=False)


def _change(address: str, name: str) -> None:
    async def work() -> Firm:
        from coase.agents.firm import Firm, FirmFile

        file = FirmFile()
        known = file.read() or Firm("listed")
        made = known.with_key(address.lower(), name) if name else known.without_key(address.lower())
        file.write(made)
        return made

    made = perform(work)
    say(f"{made.name}: {len(made.keys)} listed {'key' if len(made.keys) == 1 else 'keys'}")


def _require(known: Firm | None) -> Firm:
    if known is None:
        raise ConfigurationError("no firm: make one with: coase firm create NAME")
    return known


def _require_none(known: Firm | None) -> None:
    if known is not None:
        raise ConfigurationError(
            f"this machine is of the firm {known.name!r} already; first: coase firm leave"
        )


def _code(known: Firm) -> str:
    if known.code is None:
        raise ConfigurationError(f"{known.name!r} has no code: its members are listed by key")
    return known.code.text


def _told(known: Firm) -> dict[str, Any]:
    by_code = known.code is not None
    return {"name": known.name, "keys": dict(known.keys), "by_code": by_code}


def _uses() -> list[_Use]:
    """Return who did how much for whom without a price, the most first."""
    from coase.agents.config import state_home

    from .journals import deals_below

    found: dict[tuple[str, str, str], _Use] = {}
    for row in deals_below(state_home() / "nodes"):
        if row.get("method") != "none" or row["open"] or row.get("rates"):
            continue
        key = (row["node"], row["counterparty"], row["side"])
        use = found.setdefault(key, _Use(*key))
        use.deals += 1
        use.input_tokens += row["usage"].get("input_tokens", 0)
        use.output_tokens += row["usage"].get("output_tokens", 0)
    return sorted(found.values(), key=lambda use: (-use.output_tokens, -use.deals))


def _print(uses: list[_Use]) -> None:
    table = Table(box=None)
    for name in ("node", "did", "with", "deals", "tokens read", "tokens written"):
        table.add_column(name, justify="right" if "tokens" in name or name == "deals" else "left")
    for use in uses:
        did = "worked for" if use.side == "seller" else "was served by"
        counts = (str(n) for n in (use.deals, use.input_tokens, use.output_tokens))
        table.add_row(use.agent, did, use.counterparty[:10], *counts)
    err.print("within the firm, without a price:", style="dim")
    out.print(table)
