"""``coase explain``: why an answer came from where it came, and what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from coase.protocol.errors import ConfigurationError

from .app import Json, app, emit, out, perform, say
from .gateway_keys import GatewayState, directory_of

if TYPE_CHECKING:
    from pathlib import Path


@app.command()
def explain(
    call: Annotated[
        str, typer.Argument(help="Id of the call, or its beginning: the header x-coase-call.")
    ] = "",
    last: Annotated[int, typer.Option(min=1, max=1_000, help="How many to list.")] = 10,
    state: GatewayState = None,
    json_: Json = False,
) -> None:
    """Tell why a call of the gateway was answered by whom it was, and what else was on offer.

    Without an id it lists the latest calls. What a deal cost that was open then is told as it is
    in the books by now.

    Example: [b]coase explain 6f1c2a[/b]
    """

    async def work() -> list[dict[str, Any]]:
        directory = directory_of(state)
        return _by_now(directory, _read(directory, call, last))

    found = perform(work)
    if json_:
        emit(found[0] if call else found)
        return
    from coase.agents.compute.explain import told

    if not found:
        out.print("no call was answered yet; coase gateway answers them", soft_wrap=True)
    for document in found:
        lines = list(told(document))
        for line in lines if call else lines[:2]:
            out.print(line, highlight=False, soft_wrap=True, markup=False)


def _by_now(directory: Path, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return calls with what their deals cost by now."""
    from contextlib import closing

    from coase.agents.compute.explain import settled
    from coase.tools.gateway.usage import USAGE_FILE, UsageJournal

    if not (directory / USAGE_FILE).exists():
        return found
    try:
        with closing(UsageJournal(directory)) as usage:
            return [settled(document, usage.deals_of(document["call"])) for document in found]
    except ConfigurationError as error:
        say(f"what open deals cost by now is not known: {error}", style="yellow")
        return found


def _read(directory: Path, call: str, last: int) -> list[dict[str, Any]]:
    """Return what is kept of one call, or of the latest ones.

    :raises ConfigurationError: if that call is not kept
    """
    from coase.agents.compute.calllog import CALLS_FILE, CallLog

    if not (directory / CALLS_FILE).exists():
        if call:
            raise ConfigurationError(f"no gateway has kept anything in {directory}; see --state")
        return []
    log = CallLog(directory)
    try:
        if not call:
            return log.latest(last)
        found = log.find(call)
    finally:
        log.close()
    if found is None:
        raise ConfigurationError(
            f"no call {call!r} is kept in {directory}: coase explain lists those that are"
        )
    return [found]
