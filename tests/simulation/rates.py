"""What a node of a simulated world does under rates: agrees, calls, stops, and its vices."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from coase.agents.asks import Wish
from coase.agents.metering import call_units
from coase.agents.standing import CALL_REFUSED
from coase.protocol.calls import call_id
from coase.protocol.envelope import read_header
from coase.protocol.errors import BudgetExhausted, LocalProtocolError, MalformedEnvelope
from coase.protocol.messages import CALLS_MAX, ENVELOPE_LIFE_MAX_MS, commitment
from coase.protocol.states import Role, State
from coase.protocol.terms import settlement_digest
from tests.simulation.till import INPUT_MAX, OUTPUT_MAX

if TYPE_CHECKING:
    from coase.agents.desk import Desk
    from coase.agents.steps import Notice
    from coase.protocol.session import Thread
    from tests.simulation.node import Node

STOPPED: Final = "not wanted any more"
MISCALLS: Final = (
    "number",
    "price",
    "task",
    "lock_by_s",
    "input_max",
    "output_max",
    "dear",
    "deal",
    "stranger",
    "over",
    "none",
    "channel",
)


class Caller:
    """What a node buys and sells under rates in one of its lives."""

    def __init__(self, node: Node, desk: Desk) -> None:
        self.node, self.world, self.desk = node, node.world, desk
        self._planned: dict[str, list[str]] = {}
        """What waits for rates, by the request for them."""

    # ---- buying ----------------------------------------------------------------------------------

    def plan(self, task: str) -> bool:
        """Call for some work, or ask for rates first; return False if there are none to be had."""
        node, rng = self.node, self.node.rng
        texts = [task] if len(task) > 40 else [f"{task}.{n}" for n in range(rng.choice((1, 2, 4)))]
        mine = [c for c in self.desk.contracts() if self._stands(c)]
        if mine and rng.random() < 0.8:
            contract = rng.choice(mine)
            for text in texts:
                self._call(contract.deal, text)
            return True
        percent = self.world.plan.firm_percent
        free = node.name.endswith("0") and bool(percent) and rng.randrange(100) < percent
        return self._agree(texts, free=free)

    def _stands(self, contract: Thread) -> bool:
        return contract.side is Role.BUYER and contract.deal not in self.desk.abandoned

    def _agree(self, texts: list[str], *, free: bool) -> bool:
        node, rng = self.node, self.node.rng
        lines = self.desk.streams.lines.values()
        known = {line.buyer.config.receiver for line in lines if line.buyer is not None}
        if not (known or free):
            return False
        wish = Wish(
            self.world.capability,
            self.world.schemas,
            "",
            deliver_within_s=60,
            input_max=INPUT_MAX,
            output_max=OUTPUT_MAX,
            settlements=("none",) if free else ("channel",),
            reply_within_ms=rng.choice((500, 1_500)),
            bids_max=rng.choice((1, 2, 16)),
            allowed=frozenset() if free else frozenset(known),
        )
        try:
            ask, step = node.buyer.ask(wish, node.strategy(), now_ms=node.clock())
        except BudgetExhausted:
            return True
        node.asked[ask.request_id] = ""
        self._planned[ask.request_id] = texts
        self.world.counts["rates asked"] += 1
        node.take(step)
        return True

    def noticed(self, notice: Notice) -> None:
        """Call once rates are agreed; buy as usual what came to nothing."""
        thread, rng = notice.thread, self.node.rng
        if notice.kind == "agreed" and thread is not None and thread.is_contract:
            for text in self._planned.pop(thread.request_id, ()):
                later = rng.choice((0, 0, 0, 400))
                self.world.later(later, self.node.guard(self._call), thread.deal, text)
            stop_ms = rng.choice((2_000, 8_000, 30_000, 30_000))
            self.world.later(stop_ms, self.node.guard(self._stop), thread.deal)
        elif notice.kind == "said:agreed" and thread is not None and thread.is_contract:
            if rng.random() < 0.15:
                stop_ms = rng.randint(0, 6_000)
                self.world.later(stop_ms, self.node.guard(self._stop), thread.deal)
        elif notice.kind == "request_ended":
            for text in self._planned.pop(notice.deal, ()):
                self._as_usual(text)
            if thread is not None and CALL_REFUSED in thread.why and rng.random() < 0.5:
                self._as_usual(f"{thread.number} of {thread.contract[:6]} again")

    def _as_usual(self, text: str) -> None:
        delay_ms = self.node.rng.randint(0, 200)
        self.world.later(delay_ms, self.node.guard(self.node.ask_market), text)

    def _stop(self, deal: str) -> None:
        thread = self.desk.threads.get(deal)
        if thread is not None:
            if thread.contract:
                self.world.payments.given_up.add(deal)
            self.node.take(self.desk.stop(deal, STOPPED, now_ms=self.node.clock()))

    def _call(self, deal: str, text: str) -> None:
        """Call for one piece of work; buy it as usual where that cannot be."""
        node, rng = self.node, self.node.rng
        contract = self.desk.threads.get(deal)
        if contract is None:
            self._as_usual(text)
            return
        wish = Wish(
            self.world.capability,
            self.world.schemas,
            text,
            input_max=INPUT_MAX,
            output_max=rng.choice((OUTPUT_MAX, OUTPUT_MAX, 60)),
            kept=rng.random() < 0.8,
        )
        try:
            ask, step = node.buyer.call(contract, wish, now_ms=node.clock())
        except (LocalProtocolError, BudgetExhausted) as error:
            self.world.note(node, f"does not call under {deal[:6]}: {error}")
            self.world.counts["calls not made"] += 1
            self._as_usual(text)
            return
        node.asked[ask.request_id] = ""
        self.world.counts["calls"] += 1
        node.take(step)
        if rng.random() < 0.04:
            self.world.later(rng.randint(20, 3_000), node.guard(self._stop), ask.chosen)
        if node.vices.get(Role.BUYER) == "miscalls":
            for _ in range(3):
                self.world.later(rng.randint(0, 2_500), node.guard(self._miscall))

    def abandoned(self) -> list[str]:
        """Return what a new life does not go on with: its rates, and calls that nobody keeps."""
        calls = []
        if self.node.buys:
            for thread in self.node.buyer.under_way():
                ask = self.node.buyer.asks.get(thread.request_id)
                if thread.contract and thread.result is None and ask and not ask.wish.kept:
                    calls.append(thread.deal)
        self.world.payments.given_up.update(calls)
        return calls + [contract.deal for contract in self.desk.contracts()]

    # ---- lies of a buyer ---------------------------------------------------------------------

    def _miscall(self) -> None:
        """Say a call that its seller has to refuse, whatever was called before."""
        rng, payments = self.node.rng, self.world.payments
        how = rng.choice(MISCALLS)
        rates = [
            found
            for found in payments.contracts.values()
            if found.thread is not None
            and (found.buyer is self.node) is not (how == "stranger")
            and found.seller is not self.node
        ]
        if how == "over":
            rates = [found for found in rates if found.thread_of_seller() is None]
        if not rates:
            return
        found = rng.choice(rates)
        contract, seller = found.thread, found.seller
        assert contract is not None
        call = self._covered(contract)
        deal = self._spoil(call, contract, how)
        if deal:
            wire = self._wire("call", call, contract, deal=deal, re=contract.deal)
            self.world.counts[f"miscalls: {how}"] += 1
            self.world.later(rng.randint(1, 40), unmoved, seller, wire, f"took a miscall: {how}")

    def _covered(self, contract: Thread) -> dict[str, object]:
        """Return a call that its contract covers, of a number that nobody gets to."""
        terms, rng = contract.agreed_terms, self.node.rng
        limits = {"input_max": terms.work.input_max, "output_max": terms.work.output_max}
        units = call_units(terms, **limits)
        return {
            "salt": "0x" + rng.randbytes(32).hex(),
            "task": "a lie",
            **self.desk.streams.task_fields(contract),
            "number": rng.randint(5_000, CALLS_MAX),
            "lock_by_s": min(self.node.clock() // 1_000 + 30, terms.lock_by_s),
            "price_units": str(units),
            **limits,
        }

    def _spoil(self, call: dict[str, object], contract: Thread, how: str) -> str:
        """Make a call one that is to be refused; return its deal's id, or nothing if it cannot."""
        terms, rng = contract.agreed_terms, self.node.rng
        called = [
            deal
            for deal in self.world.payments.deals.values()
            if deal.contract == contract.deal and deal.seller.name in deal.opened
        ]
        match how:
            case "number" if called:
                call["number"] = rng.choice(called).number
            case "price" if terms.price_units > 1:
                call["price_units"] = "1"
            case "task" if terms.price_units:
                few = {"input_max": 3, "output_max": terms.work.output_max}
                call |= {"task": "too long a task for it", **few}
                call["price_units"] = str(call_units(terms, **few))
            case "lock_by_s":
                call["lock_by_s"] = terms.lock_by_s + 1
            case "input_max" | "output_max":
                call[how] = getattr(terms.work, how) + 1
            case "dear":
                call["price_units"] = str(terms.price_units + 1)
            case "deal":
                return str(rng.randbytes(16).hex())
            case "none":
                call["number"] = rng.choice((0, CALLS_MAX + 1))
                return str(rng.randbytes(16).hex())
            case "channel" if called:
                return self._rechannelled(call, [deal.deal for deal in called])
            case "stranger" | "over":
                pass
            case _:
                return ""
        return call_id(contract.deal, int(str(call["number"])))

    def _rechannelled(self, call: dict[str, object], deals: list[str]) -> str:
        """Make it the same call again, but paid by another channel."""
        threads = (self.desk.threads.get(deal) for deal in deals)
        begun = [thread for thread in threads if thread is not None and thread.task is not None]
        if not begun:
            return ""
        thread = self.node.rng.choice(begun)
        assert thread.task is not None
        call |= json.loads(thread.task.model_dump_json())
        call["channel_salt"] = "0x" + "77" * 32
        return thread.deal

    # ---- lies of a seller --------------------------------------------------------------------

    def heard(self, wire: bytes) -> None:
        """Refuse a call, and do it all the same: it must be paid in full, or not at all."""
        if self.node.vices.get(Role.SELLER) != "refuses_and_works" or not self.node.up:
            return
        try:
            head = read_header(wire)
        except MalformedEnvelope:
            return
        thread = self.desk.threads.get(head.deal)
        vicious = thread is not None and self.node.vice_here(head.deal) == "refuses_and_works"
        if head.kind != "call" or thread is None or not vicious:
            return
        body: dict[str, object] = {"reason": "capacity", "detail": "", "now_ms": self.node.clock()}
        no = self._wire("nack", body, thread, deal=thread.deal, re=head.id)
        self.world.counts["refused and done"] += 1
        self.world.send(self.node, thread.counterparty, no)

    def deliver_again(self, deal: str) -> None:
        """Say another result, dearer than the first, and its first words once more."""
        thread, rng = self.desk.threads.get(deal), self.node.rng
        if thread is None or thread.result is None:
            return
        units, salt = thread.agreed_terms.price_units, rng.randbytes(32)
        text = json.dumps({"text": thread.shown + " And more. " * 40})
        deliverable = commitment(salt, text.encode())
        digest = settlement_digest(thread.domain, thread.job_id, deliverable, units)
        result: dict[str, object] = {
            "salt": "0x" + salt.hex(),
            "result": text,
            "to_seller_units": str(units),
            "usage": {},
            "signature": "0x" + self.node.identity.sign(digest).hex(),
        }
        chunk: dict[str, object] = {"text": "x", "tokens": 1, "at": 0, "due_units": str(units)}
        for kind, body in (("result", result), ("chunk", chunk)):
            wire = self._wire(kind, body, thread, deal=deal, re=thread.task_id)
            self.world.later(rng.randint(10, 1_500), self._say_again, wire, thread)

    def _say_again(self, wire: bytes, thread: Thread) -> None:
        buyer = self.world.by_address[thread.counterparty]
        theirs = buyer.desk.threads.get(thread.deal) if buyer.up else None
        if theirs is not None and theirs.result is None:
            return  # Then it would be the first one.
        self.world.counts["delivered twice"] += 1
        unmoved(buyer, wire, "took a second delivery")

    def _wire(
        self, kind: str, body: dict[str, object], thread: Thread, *, deal: str, re: str
    ) -> bytes:
        now_ms = self.node.clock()
        return self.desk.codec.encode(
            kind=kind,
            message_id=self.node.rng.randbytes(16).hex(),
            to=thread.counterparty if thread.holder == self.node.me else thread.agreed_terms.seller,
            deal=deal,
            re=re,
            sent_ms=now_ms,
            expires_ms=now_ms + ENVELOPE_LIFE_MAX_MS,
            plain=json.dumps(body, separators=(",", ":")).encode(),
            key=thread.their_key,
        )


def unmoved(node: Node, wire: bytes, what: str) -> None:
    """Let a node hear what it must refuse, and see that nothing of its deals changed."""
    if not node.up:
        return
    desk, before = node.desk, dict(node.desk.threads)
    node.hear(wire)
    after = desk.threads
    same = before.keys() == after.keys() and all(before[d] is after[d] for d in before)
    bound = State.AGREED  # A call opens its deal there.
    new = [deal for deal in after if deal not in before and after[deal].state is bound]
    node.world.require(same or not node.up, node, what, *new)
