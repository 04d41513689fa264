"""What must never happen with channels: to their money, to what is signed, and to what is sent."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from coase.agents.history import view_from_json
from coase.agents.metering import is_counted, result_units, units_of
from coase.agents.purse import spent_in_row
from coase.agents.standing import CALL_REFUSED
from coase.escrow.accounts import (
    ChunkSent,
    VoucherPromised,
    VoucherTaken,
    decode_record,
)
from coase.protocol.calls import call_id
from coase.protocol.session import limit_s
from coase.protocol.states import BOUND, Role, State
from coase.protocol.types import Phase
from tests.simulation.till import CHUNK_MAX_UNITS, TWISTS

if TYPE_CHECKING:
    from coase.agents.ports import Record
    from coase.agents.steps import Step
    from coase.protocol.session import Thread
    from tests.simulation.node import Node
    from tests.simulation.world import World

SENT: Final = (b'{"kind":"chunk"', b'{"kind":"result"')


@dataclass(slots=True)
class Tab:
    """One channel, as the disks of its two sides tell of it."""

    buyer: str
    seller: str
    promised_units: int = 0
    totals: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Each total that was signed: for which deal, and by how much more."""
    taken_units: int = 0
    sent_units: int = 0
    """What the seller delivered, in all."""


@dataclass(slots=True)
class Streamed:
    """One deal without an escrow."""

    deal: str
    buyer: Node
    seller: Node
    method: str
    signed_units: int = 0
    """What its buyer signed away for it."""
    sent_units: int = 0
    got_units: int = 0
    locked: set[str] = field(default_factory=set)
    price_units: int = 0
    job_id: bytes = b""
    contract: str = ""
    """The rates under which it was called for, if it was."""
    number: int = 0
    opened: set[str] = field(default_factory=set)
    """Of a call, on whose disks it is."""


@dataclass(slots=True)
class Rates:
    """One rate contract, under which others may be paid and which itself never is."""

    buyer: Node
    seller: Node
    thread: Thread | None = None
    """As its buyer sees it."""
    since: dict[str, int] = field(default_factory=dict)
    """At how many points of each side the power could have gone before it was agreed."""

    def thread_of_seller(self) -> Thread | None:
        """Return the contract as its seller sees it, if it is in force there."""
        if self.thread is None or not self.seller.up:
            return None
        return self.seller.desk.threads.get(self.thread.deal)


class Payments:
    """The checks of a world with channels."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.tabs: dict[str, Tab] = {}
        self.deals: dict[str, Streamed] = {}
        self.contracts: dict[str, Rates] = {}
        self.given_up: set[str] = set()
        """Calls that their buyer broke off, or forgot with its life."""

    # ---- as it happens -----------------------------------------------------------------------

    def stepped(self, node: Node, step: Step) -> None:
        """Look at what a node is about to say of its streams."""
        for effect in step.effects:
            thread = getattr(effect, "thread", None)
            if thread is None or not thread.streamed:
                continue
            if thread.state in BOUND:
                self._know(node, thread)
            if effect.kind == "said:voucher":  # type: ignore[union-attr]
                self._paying(node, thread)
            if effect.kind == "said:call":  # type: ignore[union-attr]
                aside = node.purse.reserved.get(thread.deal, 0)
                whole = aside == thread.agreed_terms.price_units
                self.world.require(whole, node, "called without money", thread.deal, aside)

    def _know(self, node: Node, thread: Thread) -> None:
        other = self.world.by_address[thread.counterparty]
        buyer, seller = (node, other) if thread.side is Role.BUYER else (other, node)
        if thread.is_contract:
            since = {buyer.name: buyer.points, seller.name: seller.points}
            rates = self.contracts.setdefault(thread.deal, Rates(buyer, seller, since=since))
            rates.thread = thread if node is buyer else rates.thread
            return
        found = self.deals.get(thread.deal)
        forgotten = found is not None and found.contract and not found.opened and node is buyer
        if found is None or forgotten:  # What was not on the disk nobody else has heard of.
            found = Streamed(thread.deal, buyer, seller, thread.method)
            found.price_units = thread.agreed_terms.price_units
            found.job_id, found.contract = thread.job_id, thread.contract
            found.number = thread.number
            self.deals[thread.deal] = found
        liar = "lies" in buyer.vices.values()  # Its own desk knows other terms than it told.
        same = found.job_id == thread.job_id or not found.contract or liar
        self.world.require(same, node, "two terms of one deal", thread.deal)
        # What was called for is known to nobody whose power went before it was on the disk.
        if thread.state is not State.AGREED and not thread.contract:
            found.locked.add(node.name)

    def _paying(self, node: Node, thread: Thread) -> None:
        """Require that a buyer pays for no more than came and was good."""
        terms = thread.agreed_terms
        worth = units_of(thread, thread.shown)
        if thread.result is not None and thread.verdict == "good":
            asked = int(thread.result.to_seller_units)
            fair = result_units(thread, thread.result.result) if is_counted(terms) else asked
            worth = max(worth, min(asked, fair))
        paid = thread.paid_units <= min(worth, terms.price_units)
        self.world.require(paid, node, "paid for more than came", thread.deal, thread.paid_units)

    def recorded(self, node: Node, record: Record) -> None:
        """Take note of what is on a disk."""
        if record.kind == "channel":
            row = json.loads(record.data)["config"]
            self.tabs.setdefault(record.deal, Tab(row["payer"], row["receiver"]))
        elif record.kind == "voucher":
            self._moved(node, record)
        elif record.kind == "said" and record.data.startswith(SENT):
            self._said(node, record)
        elif record.kind == "thread" and b'"called"' in record.data:
            self._opened(node, record)
        elif record.kind == "saw" and record.deal in self.deals:
            if view_from_json(record.data)[0].phase is Phase.WORKING:
                self.deals[record.deal].locked.add(node.name)

    def _opened(self, node: Node, record: Record) -> None:
        """Require that a number opens one deal, and that one once."""
        contract, number, *_ = json.loads(record.data)["called"]
        deal, require = self.deals[record.deal], self.world.require
        require(node.name not in deal.opened, node, "one number began twice", record.deal, number)
        deal.opened.add(node.name)
        follows = record.deal == call_id(contract, number)
        require(follows, node, "a call of another number", record.deal, number)
        require(node.name in deal.opened, node, "a call", number)
        buyer_first = deal.buyer.name in deal.opened
        require(buyer_first, node, "called before it was durable", record.deal)

    def _moved(self, node: Node, record: Record) -> None:
        tab, require = self.tabs[record.deal], self.world.require
        moved = decode_record(record.data)
        name = getattr(moved, "deal_id", "")
        require(name not in self.contracts, node, "money of a rate contract", name)
        match moved:
            case VoucherPromised(deal, units, total):
                again = tab.totals.get(total)
                require(again is None, node, "signed a total twice", deal, again)
                grown = total == tab.promised_units + units
                require(grown, node, "forgot what was signed", total, tab.promised_units)
                tab.promised_units, tab.totals[total] = total, (deal, units)
                paid = self.deals[deal]
                paid.signed_units += units
                within = paid.signed_units <= paid.price_units
                require(within, node, "signed above the price", deal, paid.signed_units)
            case VoucherTaken(deal, units, total, _):
                signed = tab.taken_units < total <= tab.promised_units
                require(signed, node, "took a voucher that was not signed", deal, total)
                tab.taken_units = total
                self.deals[deal].got_units += units
            case ChunkSent(deal, units):
                self._sent(node, tab, self.deals[deal], units)

    def _sent(self, node: Node, tab: Tab, deal: Streamed, units: int) -> None:
        require = self.world.require
        deal.sent_units += units
        tab.sent_units += units
        most = self._trusted(tab.buyer, tab.seller)
        require(units <= most, node, "sent too large a chunk", deal.deal, units)
        open_units = tab.sent_units - tab.taken_units
        fine = open_units <= most
        require(fine, node, "delivered too much unpaid", deal.deal, open_units)

    def _trusted(self, buyer: str, seller: str) -> int:
        """Return what a seller may risk in one deal: more with a buyer who has paid before."""
        tabs = self.tabs.values()
        paid = sum(tab.taken_units for tab in tabs if (tab.buyer, tab.seller) == (buyer, seller))
        return max(CHUNK_MAX_UNITS, paid // 2)

    def _said(self, node: Node, record: Record) -> None:
        """Require that all that leaves and costs something was counted before."""
        deal = self.deals.get(record.deal)
        if deal is None or deal.method != "channel":
            return
        body: dict[str, Any] = json.loads(json.loads(record.data)["plain"])
        due = int(body["due_units"] if "due_units" in body else body["to_seller_units"])
        counted = due <= deal.sent_units
        self.world.require(counted, node, "sent what it did not count", deal.deal, due)

    def spent(self, node: Node) -> int:
        """Return what a buyer has signed away in deals that its purse holds nothing for now."""
        held = node.purse.reserved
        return sum(
            deal.signed_units
            for deal in self.deals.values()
            if deal.buyer is node and deal.deal not in held
        )

    def watch(self) -> None:
        """Look, after every block, at the money and the deadlines."""
        world, tip = self.world, self.world.ledger.tip
        total = sum(tip.balances.values())
        world.require(total == world.ledger.minted_units, None, "units were made or lost", total)
        held, owed = tip.balances.get(tip.domain.contract, 0), 0
        for name, tab in self.tabs.items():
            view = tip.view(bytes.fromhex(name))
            owed += view.free_units
            within = view.claimed_units <= tab.promised_units
            world.require(within, None, "claimed above what was signed", name[:8])
        owed += sum(tip.unpaid(seller) for seller in {tab.seller for tab in self.tabs.values()})
        world.require(held >= owed, None, "the channels owe more than they hold", held, owed)
        head_s = world.chain.head().time_s
        for node in world.nodes:
            if node.up:
                self._in_time(node, head_s)
                self._hold_nothing(node)

    def _hold_nothing(self, node: Node) -> None:
        """Require that rates by themselves take no money, no place and no time."""
        desk = node.desk
        for contract in desk.contracts():
            deal = contract.deal
            idle = contract.state is State.AGREED and not contract.paid_units
            idle = idle and deal not in desk.bound() and not node.purse.reserved.get(deal)
            idle = idle and not any(deal in deals for deals in desk.working.values())
            self.world.require(idle, node, "rates that hold something", deal, contract.state)

    def _in_time(self, node: Node, head_s: int) -> None:
        for thread in node.desk.threads.values():
            if not thread.streamed or thread.state not in BOUND:
                continue
            limit = limit_s(thread)
            fine = limit is None or head_s <= limit + 20
            self.world.require(fine, node, "stuck in a stream", thread.deal, thread.state)

    # ---- at the end ----------------------------------------------------------------------------

    def finish(self) -> None:
        """Let those run who armed a withdrawal, claim all, and compare what both sides tell."""
        world = self.world
        there = [node for node in world.nodes if not node.vanished and node.up]
        world.ledger.loses = lambda _: False
        for _ in range(8):  # The delay, at the pace at which a seller has to look.
            world.now += 150_000
            for _ in range(world.plan.confirmations + 1):
                world.chain.seal(world.now // 1_000)
                world.ledger.seal(world.now // 1_000)
            for node in there:
                node.desk.head = world.chain.head()
                node.till.look()
                node.till.calls.clear()
                node.till.claim()
        for node in world.nodes:
            if node.vices.get(Role.BUYER) == "arms":
                node.till.run_away()
        world.ledger.seal(world.now // 1_000)
        self.watch()
        if world.plan.deep_reorgs:
            return
        for name, tab in self.tabs.items():
            seller = world.by_address[tab.seller]
            claimed = world.ledger.tip.view(bytes.fromhex(name)).claimed_units
            if seller in there:
                whole = claimed == tab.taken_units
                world.require(whole, seller, "lost what it was paid", claimed, tab.taken_units)
        for deal in [one for one in self.deals.values() if one.contract]:
            if deal.buyer.name not in deal.opened:  # It was on no disk when the power went.
                never = not (deal.opened or deal.signed_units or deal.sent_units)
                world.require(never, deal.buyer, "a call out of nothing", deal.deal)
                del self.deals[deal.deal]
        for deal in self.deals.values():
            self._told(deal)
        for name, rates in self.contracts.items():
            for node in (rates.buyer, rates.seller):
                row = node.store.summaries.get(name)
                free = row is None or (row["state"], row["to_seller_units"]) == (State.LAPSED, 0)
                world.require(free, node, "rates that cost something", name, row)
        self._add_up()
        for node in world.nodes:
            if node.buys and node.up:
                self._purse(node)
        world.counts["rates agreed"] += len(self.contracts)

    def _purse(self, node: Node) -> None:
        """Require that a purse holds nothing any more, and has spent what the journal tells."""
        rows = node.store.summaries.values()
        spent = sum(spent_in_row(row) or 0 for row in rows)
        told = node.purse.balance.spent_units
        self.world.require(told == spent, node, "a purse tells another sum", told, spent)
        held = node.purse.reserved
        self.world.require(not held, node, "a purse holds something still", held)

    def _add_up(self) -> None:
        """Require that sellers tell of no more in all their deals than they hold vouchers for."""
        told: Counter[tuple[str, str]] = Counter()
        for deal in self.deals.values():
            row = deal.seller.store.summaries.get(deal.deal)
            if row is not None:
                told[deal.buyer.me, deal.seller.me] += int(row["to_seller_units"])  # type: ignore[call-overload]
        for tab in self.tabs.values():
            told[tab.buyer, tab.seller] -= tab.taken_units
        for (buyer, seller), units in told.items():
            node = self.world.by_address[seller]
            self.world.require(units <= 0, node, "tells of more than all vouchers", buyer, units)

    def _told(self, deal: Streamed) -> None:
        """Compare what both sides wrote into their books."""
        require = self.world.require
        told = [node.store.summaries.get(deal.deal) for node in (deal.buyer, deal.seller)]
        paid = [int(row["to_seller_units"]) if row is not None else 0 for row in told]  # type: ignore[call-overload]
        most = self._trusted(deal.buyer.me, deal.seller.me)
        tale = (deal.deal, deal.method, deal.buyer.name, deal.seller.name, paid, deal.locked)
        for node, row in zip((deal.buyer, deal.seller), told, strict=True):
            there = not node.vanished and (not deal.contract or node.name in deal.opened)
            require(row is not None or not there, node, "has no end of a stream", *tale)
        if told[0] is not None:
            require(paid[0] == deal.signed_units, deal.buyer, "tells another sum", *tale)
        # Who lies about which deal a voucher pays for is believed, as far as the sum of all goes.
        lies = "lies" in deal.buyer.vices.values()
        if told[1] is not None and not lies:
            require(paid[1] <= deal.signed_units, deal.seller, "tells of more than it got", *tale)
            short = deal.signed_units - paid[1]
            require(short <= most, deal.seller, "lost more than a chunk", *tale)
        open_units = deal.sent_units - deal.signed_units
        within = lies or open_units <= most
        require(within, deal.seller, "gave more than a chunk", *tale)
        # Who arms a withdrawal, or signs what it should not, does so to all deals of a channel.
        spoilt = deal.buyer.vices.get(Role.BUYER) in ("arms", *TWISTS) or self._owes(deal)
        honest = deal.buyer.honest(deal.deal, Role.BUYER) and not spoilt
        if honest and deal.seller.honest(deal.deal, Role.SELLER):
            # No loss, crash, cut or halt of this world lasts as long as the time to deliver.
            ends = [row["state"] if row is not None else "" for row in told]
            if len(deal.locked) == 2 and deal.deal not in self.given_up:
                good = told[0] is not None and told[0]["verdict"] == "good"
                good = good and ends == [State.SETTLED, State.SETTLED]
                require(good, None, "honest sides came to nothing", *tale, *ends)
                require(paid[0] == paid[1], None, "two sums of one deal", *tale)

    def _owes(self, deal: Streamed) -> bool:
        """Return whether a buyer left so much unpaid elsewhere that its seller gives no more."""
        pair = deal.buyer, deal.seller
        others = [one for one in self.deals.values() if (one.buyer, one.seller) == pair]
        owed = sum(max(0, one.sent_units - one.signed_units) for one in others if one is not deal)
        return 0 < owed > CHUNK_MAX_UNITS - deal.price_units

    def tally(self) -> Counter[str]:
        """Return how the deals ended, as their buyers tell."""
        found: Counter[str] = Counter()
        for deal in self.deals.values():
            row = deal.buyer.store.summaries.get(deal.deal) or {"state": "left", "how": "open"}
            state = row["state"]
            if state == State.REFUNDED and CALL_REFUSED in str(row["why"]):
                state = "refused"
            elif state == State.REFUNDED and deal.deal in self.given_up:
                state = "given up"
            found[f"{'call' if deal.contract else deal.method} {state}"] += 1
        return found
