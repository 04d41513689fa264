"""The demonstration on a screen: what happens as it happens, and who earned what at the end."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any, Final

from rich.console import Console, Group
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from coase.agents.steps import Notice
from coase.protocol.session import Thread
from coase.protocol.states import Role
from coase.protocol.types import units_to_text

from .report import deals_of, earnings
from .story import Outcome

LINES_KEPT: Final = 400
REFRESH_PER_S: Final = 8
FEED_COLUMNS: Final = 64  # What the longest names say of the longest prices.
DEALS_COLUMNS_MIN: Final = 36
DEALS_BELOW: Final = 5  # Deals in flight that are shown below the feed where it is narrow.
STATE_COLUMNS: Final = len("delivered")
PRICE_COLUMNS: Final = len("0.012345")
DECIMALS: Final = 6
_STYLES: Final = {
    "asks": "bold cyan",
    "offers": "white",
    "counters": "yellow",
    "agrees": "bold",
    "locks": "blue",
    "opens": "blue",
    "delivers": "white",
    "pays": "green",
    "refund": "bold magenta",
    "refuses": "bold red",
    "disputes": "bold red",
    "answers": "red",
    "ruling": "bold magenta",
}


def _money(units: int) -> str:
    return units_to_text(units, DECIMALS)


def _price(thread: Thread) -> str:
    return _money(thread.agreed_terms.price_units)


def _ware(thread: Thread) -> str:
    return thread.request.capability.rpartition("-")[0]


class Show:
    """Turns notices into lines, live in a terminal and one by one elsewhere."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self._console = console
        self._started_s = time.monotonic()
        self._lines: deque[Text] = deque(maxlen=LINES_KEPT)
        self._names: dict[str, str] = {}
        self._stage = "starting"
        self._counts: Counter[str] = Counter()
        self._open: dict[str, tuple[str, str, str, int]] = {}
        self._live = (
            Live(
                console=console,
                get_renderable=self._render,
                refresh_per_second=REFRESH_PER_S,
                transient=True,
            )
            if live
            else None
        )

    def __enter__(self) -> Show:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def progress(self, text: str) -> None:
        """Say which part of the demonstration runs now."""
        self._stage = text
        self._say(Text(f"· {text}", style="dim"))

    def notice(self, who: str, notice: Notice) -> None:
        """Show one thing that happened to the agent ``who``."""
        line = self._line(who, notice)
        if line is not None:
            self._say(line)

    def name(self, address: str) -> str:
        """Return an agent's name, or the beginning of its address."""
        return self._names.get(address, address[:8])

    def know(self, names: dict[str, str]) -> None:
        """Learn what the agents are called."""
        self._names.update(names)

    def _say(self, line: Text) -> None:
        stamp = (f"{time.monotonic() - self._started_s:5.1f}s ", "dim")
        stamped = Text.assemble(stamp, line)
        self._lines.append(stamped)
        if self._live is None:
            self._console.print(stamped, soft_wrap=True)

    def _line(self, who: str, notice: Notice) -> Text | None:
        thread = notice.thread
        if notice.kind == "asked":
            self._counts["requests"] += 1
            return self._verb(who, "asks", f"for {notice.detail.rpartition('-')[0]}")
        if thread is None:
            return None
        other = self.name(thread.counterparty)
        self._follow(who, notice, thread)
        buying = thread.side is Role.BUYER
        match notice.kind:
            case "said:offer":
                self._counts["offers"] += 1
                what = f"{other} {_ware(thread)} at {_price(thread)}"
                return self._verb(who, "offers", what)
            case "said:counter":
                self._counts["counter-offers"] += 1
                return self._verb(who, "counters", f"{other} with {_price(thread)}")
            case "agreed":
                self._counts["agreements"] += 1
                return self._verb(who, "agrees", f"with {other} on {_price(thread)}")
            case "chain:locked" if buying and thread.streamed:
                return self._verb(who, "opens", f"a channel's {_price(thread)} for {other}")
            case "chain:locked" if buying:
                return self._verb(who, "locks", f"{_price(thread)} for {other}")
            case "said:result":
                tokens = thread.result.usage.get("output_tokens", 0) if thread.result else 0
                self._counts["tokens"] += tokens
                made = f" ({tokens} tokens)" if tokens else ""
                return self._verb(who, "delivers", f"{other} {_ware(thread)}{made}")
            case "bad_result":
                return self._verb(who, "refuses", f"{other}'s result: {notice.detail[:90]}")
            case "chain:disputed" if buying:
                return self._verb(who, "disputes", f"{other}'s work with a bond")
            case "chain:answered" if not buying:
                return self._verb(who, "answers", "with a bond; the arbiter decides")
            case "ended" if buying and thread.job_id:
                return self._ended(who, other, thread)
        return None

    def _ended(self, who: str, other: str, thread: Thread) -> Text | None:
        view = thread.view
        if thread.state == "settled":
            self._counts["settled"] += 1
            paid = f"{other} {_money(view.to_seller_units)} for {_ware(thread)}"
            return self._verb(who, "pays", paid)
        if thread.state == "refunded":
            self._counts["refunded"] += 1
            if view.how.name == "RULED":
                return self._verb("arbiter", "ruling", f"against {other}: money back")
            why = view.how.name.lower().replace("_", " ")
            back = _money(view.to_buyer_units)
            return self._verb(who, "refund", f"of {back}: {other} {why}")
        return None

    def _verb(self, who: str, verb: str, rest: str) -> Text:
        return Text.assemble((f"{who:>13} ", "bold"), (f"{verb} ", _STYLES[verb]), rest)

    def _follow(self, who: str, notice: Notice, thread: Thread) -> None:
        """Keep the table of deals that both have signed and that are not over."""
        if thread.side is not Role.BUYER or not thread.job_id:
            return
        if notice.kind == "ended":
            self._open.pop(thread.deal, None)
            return
        other = self.name(thread.counterparty)
        units = thread.agreed_terms.price_units
        stage = "working" if thread.state == "locked" and thread.task_id else str(thread.state)
        self._open[thread.deal] = (f"{who} ← {other}", _ware(thread), stage, units)

    def _render(self) -> Layout:
        height = max(self._console.height - 2, 12)
        layout = Layout()
        layout.split_column(Layout(name="head", size=3), Layout(name="body"))
        if self._console.width >= FEED_COLUMNS + DEALS_COLUMNS_MIN:
            width = FEED_COLUMNS
            layout["body"].split_row(Layout(name="feed", size=width), Layout(name="deals"))
            shown = height - 6
        else:
            width, shown = 0, DEALS_BELOW
            layout["body"].split_column(
                Layout(name="feed"), Layout(name="deals", size=DEALS_BELOW + 3)
            )
            height -= DEALS_BELOW + 3
        counts = "   ".join(f"{name} {count}" for name, count in list(self._counts.items()))
        seconds = time.monotonic() - self._started_s
        head = Text.assemble((f"{seconds:4.0f} s   ", "bold"), counts, no_wrap=True)
        title = f"Coase: {self._stage}"
        layout["head"].update(Panel(head, title=title, border_style="cyan"))
        lines = [
            Text.assemble(line, no_wrap=True, overflow="ellipsis")
            for line in list(self._lines)[-max(height - 5, 1) :]
        ]
        feed = Panel(Group(*lines), title="what happens", border_style="dim", padding=0)
        layout["feed"].update(feed)
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        rest = self._console.width - width - STATE_COLUMNS - PRICE_COLUMNS - 4  # Frame and gaps.
        table.add_column("buyer ← seller", no_wrap=True, max_width=max(rest, 8))
        table.add_column("state", no_wrap=True, width=STATE_COLUMNS)
        table.add_column("price", no_wrap=True, justify="right", width=PRICE_COLUMNS)
        for parties, _, stage, units in list(self._open.values())[-shown:]:
            table.add_row(parties, stage, _money(units))
        deals = Panel(table, title="deals in flight", border_style="dim", padding=0)
        layout["deals"].update(deals)
        return layout


def show_outcome(console: Console, outcome: Outcome, figures: dict[str, Any]) -> None:
    """Print the texts that were bought, who earned what, and the proof of conservation."""
    for document in figures["documents"]:
        # What a model wrote and what a file holds is text, and never markup.
        lines = Text("\n".join(f"• {line}" for line in document["lines"]))
        title = Text(f"{document['title']}   ({document['paid']} to {document['seller']})")
        console.print(Panel(lines, title=title, title_align="left", border_style="green"))
    for failure in outcome.failures:
        console.print(Text(f"✗ {failure}", style="red"))
    table = Table(title="who earned what (COASE)")
    for column in ("agent", "sells"):
        table.add_column(column)
    for column in ("deals", "paid", "gain"):
        table.add_column(column, justify="right")
    for name, what, deals, paid, gain in earnings(outcome, DECIMALS):
        style = "red" if gain.startswith("-") and deals else ""
        table.add_row(name, what, str(deals or ""), str(paid or ""), gain, style=style)
    console.print(table)
    _show_faults(console, outcome)
    line = (
        f"{figures['requests']} requests, {figures['offers']} offers,"
        f" {figures['counter_offers']} counter-offers, {figures['agreements']} agreements"
        f" ({figures['by_escrow']} by escrow, {figures['by_channel']} by channel):"
        f" {figures['settled']} settled, {figures['refunded']} refunded,"
        f" {figures['disputed']} disputed; {figures['tokens_generated']} tokens by"
        f" {figures['model']} in {figures['wall_s']} s"
    )
    console.print(line)
    _show_conservation(console, outcome, figures)


def _show_faults(console: Console, outcome: Outcome) -> None:
    for deal in deals_of(outcome):
        if deal.agreed and deal.state == "refunded":
            how = deal.how.replace("_", " ")
            console.print(
                f"{deal.seller} took {deal.capability} from {deal.buyer} and ended [b]{how}[/b]:"
                f" {_money(deal.agreed_units)} went back"
            )


def _show_conservation(console: Console, outcome: Outcome, figures: dict[str, Any]) -> None:
    agents = sum(outcome.after.values())
    total = agents + outcome.held_units + outcome.streamed_units + outcome.bank_units
    mark = "[bold green]conserved[/]" if figures["conserved"] else "[bold red]NOT conserved[/]"
    console.print(
        f"{mark}: agents and arbiter {_money(agents)} + escrow {_money(outcome.held_units)}"
        f" + channels {_money(outcome.streamed_units)}"
        f" + faucet {_money(outcome.bank_units)} = {_money(total)};"
        f" minted {_money(outcome.supply_units)}"
    )
