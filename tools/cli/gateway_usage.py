"""``coase gateway usage``: what was asked, by whom, for what, and what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import Json, emit, out, perform, printable
from .gateway_keys import GatewayState, directory_of

if TYPE_CHECKING:
    from coase.tools.gateway.usage import Sum


def usage(
    by: Annotated[
        str, typer.Option(help="Which of day, key, tag, model, made, with commas between.")
    ] = "day,key,tag,model",
    days: Annotated[int, typer.Option(min=1, help="How many days back, today included.")] = 30,
    state: GatewayState = None,
    json_: Json = False,
) -> None:
    """Show calls, tokens and money by day, key, tag and model; days are those of UTC.

    A request's tag is its header x-coase-tag, or else the user or metadata.tag in its body.

    Example: [b]coase gateway usage --by key,tag --days 7[/b]
    """
    groups = [name.strip() for name in by.split(",") if name.strip()]

    async def work() -> list[Sum]:
        from coase.agents.runtime import clock_ms
        from coase.tools.gateway.usage import DAY_MS, USAGE_FILE, UsageJournal

        directory = directory_of(state)
        if not (directory / USAGE_FILE).exists():
            return []
        journal = UsageJournal(directory)
        try:
            today_ms = clock_ms() // DAY_MS * DAY_MS
            return journal.sums(groups, since_ms=today_ms - (days - 1) * DAY_MS)
        finally:
            journal.close()

    rows = [_row(each) for each in perform(work)]
    if json_:
        emit(rows)
        return
    if not rows:
        out.print("nothing was asked of a gateway in these days", soft_wrap=True)
        return
    _print(rows, groups)


def _row(found: Sum) -> dict[str, Any]:
    from coase.protocol.types import units_to_text

    return {
        **found.group,
        "calls": found.calls,
        "failed": found.failed,
        "input_tokens": found.input_tokens,
        "cached_input_tokens": found.cached_tokens,
        "output_tokens": found.output_tokens,
        "seconds": found.duration_ms // 1_000,
        "deals": found.deals,
        "paid": units_to_text(found.paid_units, found.decimals),
        "paid_units": str(found.paid_units),
        "open": units_to_text(found.open_units, found.decimals),
        "open_units": str(found.open_units),
        "symbol": found.symbol,
    }


def _print(rows: list[dict[str, Any]], groups: list[str]) -> None:
    from rich.text import Text

    from .look_commands import table

    shown = table("what was asked of the gateway, in tokens")
    for column in groups:
        shown.add_column(column, overflow="fold")
    for column in ("calls", "read", "cached", "written", "paid"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        paid = f"{row['paid']} {row['symbol']}" if row["deals"] else ""
        if row["open_units"] != "0":
            paid += f", and at most {row['open']} open"
        shown.add_row(
            *(Text(printable(row[name])) for name in groups),  # Clients chose the words.
            f"{row['calls']}{failed}",
            str(row["input_tokens"]),
            str(row["cached_input_tokens"] or ""),
            str(row["output_tokens"]),
            paid,
        )
    out.print(shown)
