"""What a seller of inference earns, counted and shown while it works."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from .app import emit, out, say

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import RenderableType

    from coase.agents.agent import Agent
    from coase.agents.inference import Stock
    from coase.agents.node import Node
    from coase.agents.steps import Notice
    from coase.protocol.session import Thread

ROWS_MAX: Final = 12  # Deals on the screen; the journal has them all.
ADDRESS_SHOWN: Final = 10
MODELS_SHOWN: Final = 3


class Till:
    """Counts what was earned, and shows it: as a table, line by line, or as JSON."""

    def __init__(self, node: Node, agent: Agent, stock: Stock, *, as_json: bool) -> None:
        self._agent, self._stock, self._as_json = agent, stock, as_json
        self._asset = node.settlement.asset
        self._rows: dict[str, tuple[str, ...]] = {}
        self._deals = self._unpaid = 0
        self._earned_units = self._before_units = 0
        self._tokens = [0, 0]
        self.told = False
        """Whether deals are said line by line, where no table shows them."""

    def recall(self, summaries: Iterable[Mapping[str, Any]]) -> None:
        """Take in what was earned in earlier lives."""
        for row in summaries:
            if row["side"] == "seller":
                self._before_units += int(row["to_seller_units"])

    def money(self, units: int) -> str:
        """Return an amount for people."""
        from coase.protocol.types import units_to_text

        return f"{units_to_text(units, self._asset.decimals)} {self._asset.symbol}"

    def total(self) -> str:
        """Return what was earned since the start."""
        deals = "1 deal" if self._deals == 1 else f"{self._deals} deals"
        text = f"earned {self.money(self._earned_units)} with {deals}"
        if self._before_units:
            text += f", {self.money(self._before_units + self._earned_units)} in all"
        return text

    @property
    def load(self) -> str:
        """How many answers are being written or wait, for people."""
        busy = self._busy()
        places = self._stock.concurrency
        waits = f", {busy - places} waiting" if busy > places else ""
        return f"{min(busy, places)} of {places} busy{waits}"

    def _busy(self) -> int:
        selling = self._agent.selling
        if selling is None:
            return 0
        return sum(selling.load(capability) for capability in selling.wares)

    def opened(self, balance: int, engine: str) -> None:
        """Say who sells what."""
        offering = next(iter(self._agent.offerings.values()))
        if self._as_json:
            document = {
                "agent": self._agent.name,
                "address": self._agent.address,
                "balance_units": str(balance),
                "engine": engine,
                "models": list(self._stock.names),
                "embedders": list(self._stock.embedders),
                "speed": self._stock.speed,
                "price": str(offering.price),
                "capability": offering.capability,
                "earned_before_units": str(self._before_units),
            }
            emit(document, indent=None)
            return
        for line in (
            f"{self._agent.name} {self._agent.address} has {self.money(balance)}",
            f"  sells {self._models()} of {engine} ({self._stock.speed})",
            f"  at {offering.price}; Ctrl-C ends it",
        ):
            out.print(line, highlight=False, soft_wrap=True, markup=False)

    def _models(self) -> str:
        names = tuple(dict.fromkeys((*self._stock.names, *self._stock.embedders)))
        more = f" and {len(names) - MODELS_SHOWN} more" if len(names) > MODELS_SHOWN else ""
        return ", ".join(names[:MODELS_SHOWN]) + more

    def changed(self) -> None:
        """Say that the engine has other models now, and offer those."""
        from dataclasses import replace

        selling = self._agent.selling
        for ware in list(selling.wares.values()) if selling is not None else ():
            names = self._stock.embedders if ware.name == "embedding" else self._stock.names
            assert selling is not None
            selling.sell(replace(ware, models=names))
        say(f"{self._agent.name}: the engine has other models now: {self._models() or 'none'}")

    def notice(self, who: str, notice: Notice) -> None:
        """Take note of what happened in one of our deals."""
        thread = notice.thread
        if who != self._agent.address or thread is None or thread.terms is None:
            return
        if not thread.job_id or thread.side != "seller" or thread.is_contract:
            return
        earned = thread.view.to_seller_units
        over = notice.kind == "ended"
        usage = dict(thread.result.usage) if thread.result is not None else {}
        if over:
            self._earned_units += earned
            self._deals += 1
            self._unpaid += not earned
            self._tokens[0] += usage.get("input_tokens", 0)
            self._tokens[1] += usage.get("output_tokens", 0)
        read, written = (str(usage.get(f"{side}_tokens", "")) for side in ("input", "output"))
        money = self.money(earned) if over else f"at most {self.money(thread.terms.price_units)}"
        clock = f"{datetime.now().astimezone():%H:%M:%S}"
        buyer, model = thread.counterparty[:ADDRESS_SHOWN], thread.terms.work.model
        self._rows[thread.deal] = (clock, buyer, model, str(thread.state), read, written, money)
        while len(self._rows) > ROWS_MAX:
            del self._rows[next(iter(self._rows))]
        if over:
            self._over(thread, earned, usage)

    def _over(self, thread: Thread, earned: int, usage: dict[str, int]) -> None:
        if self._as_json:
            document = {
                "deal": thread.deal,
                "buyer": thread.counterparty,
                "model": thread.agreed_terms.work.model,
                "state": str(thread.state),
                "why": thread.why,
                "usage": usage,
                "earned_units": str(earned),
                "total_units": str(self._earned_units),
                "deals": self._deals,
                "speed": self._stock.speed,
                "busy": self._busy(),
            }
            emit(document, indent=None)
        elif self.told:
            why = f" ({thread.why})" if thread.why and not earned else ""
            say(
                f"{self._agent.name}: {thread.state}{why}, {self.money(earned)} from"
                f" {thread.counterparty[:ADDRESS_SHOWN]}; since the start {self.total()};"
                f" {self._stock.speed}, {self.load}"
            )

    def table(self) -> RenderableType:
        """Return the latest deals, and what all of them came to."""
        from .look_commands import table

        unpaid = f", {self._unpaid} without pay" if self._unpaid else ""
        summary = f"{self.total()}{unpaid}"
        work = f"{self._tokens[0]} tokens read, {self._tokens[1]} written, {self._stock.speed}"
        state = f"the engine is away: {self._stock.away}" if self._stock.away else self.load
        title = f"{self._agent.name} sells {self._models()}"
        shown = table(title, "time", "buyer", "model", "state")
        shown.caption, shown.caption_justify = f"{summary}\n{work}, {state}", "left"
        for column in ("read", "written", "money"):
            shown.add_column(column, justify="right")
        for row in self._rows.values():
            shown.add_row(*row)
        return shown
