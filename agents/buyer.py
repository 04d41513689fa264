"""The buying half of a desk: asks, compares, bargains, accepts one, and goes on if it fails."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from coase.negotiation.scores import Outcome
from coase.protocol.calls import called
from coase.protocol.errors import (
    BudgetExhausted,
    LocalProtocolError,
    Refused,
    RemoteProtocolError,
)
from coase.protocol.messages import (
    BODY_INLINE_MAX_BYTES,
    ENVELOPE_LIFE_MAX_MS,
    REQUEST_REPEATS_MS,
    STREAMED,
    ZERO_BYTES32_TEXT,
    Agreed,
    Header,
    Offer,
    RateCall,
    Request,
    commitment,
    terms_to_wire,
)
from coase.protocol.session import Thread
from coase.protocol.states import Role, State
from coase.protocol.subjects import level_above, prefix_from
from coase.protocol.types import ZERO_ADDRESS

from .asks import Ask, AskState, BuyerStrategy, Decision, DeclineAll, Verdict, Wish
from .experience import Experience, outcome_of
from .fairness import unfair, unlockable
from .means import OpenMeans
from .metering import call_units
from .pieces import TASK_SIZE_MAX_BYTES, size_as_json
from .ports import Record
from .purse import OpenPurse, exposure, spent_in
from .seller import lock_within_s
from .steps import Notice, Publish, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from coase.protocol.envelope import Message
    from coase.protocol.terms import Terms
    from coase.protocol.types import AgentId

    from .desk import Desk
    from .firm import Firm

AGREE_WITHIN_MS: Final = 5_000
COUNTER_VALID_MS: Final = 10_000
WIDEN_AFTER_MS: Final = 150  # A shard that has sellers answers in a few milliseconds.
CLOSING_PAUSE_MS: Final = 250
TOO_DEAR: Final = "all offers were above the highest price"
CALL_HEAD_MAX_BYTES: Final = 1_024  # What a call says besides its task.
ASKS_MAX: Final = 1_000  # Requests remembered after their end.


class BuyerDesk:
    """All requests of one agent."""

    def __init__(self, desk: Desk, *, arbiters: tuple[str, ...] = (), start_level: int = 0) -> None:
        self.desk, self.arbiters, self.start_level = desk, arbiters, start_level
        self._levels: dict[str, int] = {}
        """By capability, the level at which enough sellers answered last."""
        self.asks: dict[str, Ask] = {}
        self._live_asks: dict[str, Ask] = {}
        self.reserve = OpenPurse()
        self.means = OpenMeans()
        self.experience = Experience()
        self._judged: set[str] = set()
        self.firm: Callable[[], Firm | None] = lambda: None  # Whose agents work for nothing.

    def ask(
        self,
        wish: Wish,
        strategy: BuyerStrategy,
        *,
        now_ms: int,
        request_id: str = "",
        salt: bytes = b"",
    ) -> tuple[Ask, Step]:
        """Ask the market. The same ``request_id`` is the same request and is asked once only.

        :raises LocalProtocolError: if the task is too large to be sent to whoever wins it
        :raises BudgetExhausted: if a limit of the purse has nothing left; nothing was asked
        """
        step = Step()
        request_id = request_id or self.desk.chance.take(16).hex()
        known = self.asks.get(request_id)
        if known is not None:
            return known, step
        if wish.settlements != ("none",):
            self.reserve.check(now_ms=now_ms, account=wish.charge.account)
            self.means.check()
        if size_as_json(wish.task) > TASK_SIZE_MAX_BYTES:
            raise LocalProtocolError(f"a task has at most {TASK_SIZE_MAX_BYTES} bytes as JSON")
        salt = salt or self.desk.chance.take(32)
        secret = self.desk.chance.take(32)
        ask = self._new(request_id, wish, strategy, salt, secret, now_ms=now_ms)
        self._record_ask(ask, step, now_ms=now_ms)
        step.effects.append(Notice("asked", request_id, detail=wish.capability))
        self._publish(ask, step, now_ms=now_ms)
        return ask, step

    def _record_ask(self, ask: Ask, step: Step, *, now_ms: int) -> None:
        data = json.dumps(
            {
                "salt": ask.salt.hex(),
                "secret": ask.secret.hex(),
                "task": ask.wish.task,
                "schemas": [ask.wish.input_schema, ask.wish.output_schema],
                "request": ask.request.model_dump_json(),
                "kept": ask.wish.kept,
            },
            ensure_ascii=False,
        ).encode()
        step.records.append(Record(self.desk.me, ask.request_id, "asked", now_ms, data))

    def _new(
        self,
        request_id: str,
        wish: Wish,
        strategy: BuyerStrategy,
        salt: bytes,
        secret: bytes,
        *,
        now_ms: int,
    ) -> Ask:
        desk = self.desk
        request = Request(
            capability=wish.capability,
            schemas="0x" + wish.schemas.hex(),
            task="0x" + commitment(salt, wish.task.encode()).hex()
            if wish.task
            else ZERO_BYTES32_TEXT,
            features=wish.features,
            chain_id=desk.domain.chain_id,
            escrow=desk.domain.contract,
            asset=desk.asset.token,
            settlements=list(wish.settlements),  # type: ignore[arg-type]
            verifications=list(wish.verifications),  # type: ignore[arg-type]
            arbiters=list(self.arbiters),
            deliver_within_s=wish.deliver_within_s,
            quality_min=wish.quality_min,
            input_max=wish.input_max,
            output_max=wish.output_max,
            model=wish.model,
            reply_by_ms=now_ms + wish.reply_within_ms,
            bids_min=wish.bids_min,
            bids_max=wish.bids_max,
            key=desk.codec.public_key(secret),
            firm=self._proof(request_id) if "none" in wish.settlements else "",
            vault=desk.vault if wish.stake_permille else ZERO_ADDRESS,
            stake_permille=wish.stake_permille,
        )
        ask = Ask(request_id, wish, salt, secret, request, now_ms, strategy)
        ask.level = self._levels.get(wish.capability, self.start_level)
        self._keep(ask)
        return ask

    def _proof(self, request_id: str) -> str:
        firm = self.firm()
        return firm.proof("buyer", request_id, self.desk.me) if firm is not None else ""

    def _is_ours(self, thread: Thread, offer: Offer) -> bool:
        """Return whether an offer is of our firm; free work of others would only see the task."""
        firm, seller = self.firm(), thread.counterparty
        return firm is not None and firm.has(
            seller, offer.firm, side="seller", request_id=thread.request_id
        )

    def _publish(self, ask: Ask, step: Step, *, now_ms: int) -> None:
        if not ask.wire:
            ask.wire = self.desk.codec.encode(
                kind="request",
                message_id=ask.request_id,
                to="*",
                deal=ask.request_id,
                re="",
                sent_ms=now_ms,
                expires_ms=min(ask.request.reply_by_ms, now_ms + ENVELOPE_LIFE_MAX_MS),
                plain=ask.request.model_dump_json().encode(),
                key="",
            )
        if ask.level == 0:
            if not ask.sent:
                ask.everybody_ms = now_ms
            ask.sent += 1
        ask.widen_ms = now_ms + WIDEN_AFTER_MS
        draw = int.from_bytes(self.desk.chance.take(2), "big") if ask.level else 0
        prefix = prefix_from(draw, level=ask.level)
        step.effects.append(Publish(ask.wish.capability, ask.wire, ask.level, prefix))

    def _repeat(self, ask: Ask, step: Step, *, now_ms: int) -> None:
        """Ask again where there are too few bids: wider first, then the same once more."""
        due_ms = self._again_ms(ask)
        if due_ms is None or now_ms < due_ms:
            return
        if ask.level:
            ask.level = level_above(ask.level) or 0
        self._publish(ask, step, now_ms=now_ms)

    def _again_ms(self, ask: Ask) -> int | None:
        """Return when to ask again, or None if there are bids enough or no time is left."""
        if ask.bids >= ask.wish.bids_min:
            return None
        if ask.level:
            again_ms = ask.widen_ms
        elif ask.sent < len(REQUEST_REPEATS_MS):
            again_ms = ask.everybody_ms + REQUEST_REPEATS_MS[ask.sent]
        else:
            return None
        return again_ms if again_ms < ask.request.reply_by_ms else None

    def reads(self, header: Header) -> bool:
        """Return whether we still look at offers for the request that ``header`` answers."""
        ask = self.asks.get(header.re)
        return (
            ask is not None
            and ask.state is AskState.OPEN
            and not ask.full
            and header.deal not in ask.offers  # That thread has ended, and journals say so.
            and ask.wish.reads(header.sender)
        )

    def offered(self, header: Header, *, now_ms: int) -> Thread | None:
        """Return a new thread for a first offer that answers one of our requests."""
        ask = self.asks.get(header.re)
        if ask is None or ask.state is not AskState.OPEN:
            return None
        if ask.full or not ask.wish.reads(header.sender):
            raise Refused("capacity", "no more offers are read for this request")
        if now_ms >= ask.request.reply_by_ms:
            raise Refused("expired", "the request no longer takes offers")
        return Thread(
            deal=header.deal,
            side=Role.BUYER,
            holder=self.desk.me,
            counterparty=header.sender,
            request_id=ask.request_id,
            request=ask.request,
            domain=self.desk.domain,
            secret=ask.secret,
            charge=ask.wish.charge,
        )

    def heard(self, thread: Thread, message: Message, step: Step, *, now_ms: int) -> None:
        """Weigh an offer, or take note that the seller agreed."""
        ask = self.asks.get(thread.request_id)
        if ask is None:
            return
        if isinstance(message.body, Offer):
            terms, margins = thread.agreed_terms, self.desk.margins
            if why := unfair(terms, thread.request, margins, now_ms=now_ms):
                self._refuse(thread, why, step, now_ms=now_ms)
                return
            if thread.method == "none" and not self._is_ours(thread, message.body):
                self._refuse(thread, "it is not of our firm", step, now_ms=now_ms)
                return
            if thread.deal not in ask.offers:
                if 0 < ask.wish.most_units < terms.price_units:
                    # It may come down, but must not keep us from reading those that need not.
                    if ask.dear >= ask.wish.bids_max:
                        self._refuse(thread, "far too dear", step, now_ms=now_ms)
                        return
                    ask.dear += 1
                ask.offers.append(thread.deal)
                ask.bids += 1
                if ask.bids == ask.wish.bids_min:
                    self._levels[ask.wish.capability] = ask.level
            self._decide(ask, step, now_ms=now_ms)
        elif isinstance(message.body, Agreed):
            ask.state = AskState.BOUND
            ask.strategy.agreed(thread)
            step.effects.append(Notice("agreed", thread.deal, thread))
            self._turn_away(ask, step, now_ms=now_ms)

    def _refuse(self, thread: Thread, why: str, step: Step, *, now_ms: int) -> None:
        """Turn an offer away that no price makes good."""
        body: dict[str, object] = {"proposal": thread.proposal_id, "reason": why}
        self.desk.say(thread.deal, "reject", body, step, now_ms=now_ms, re=thread.proposal_id)
        step.effects.append(Notice("unfair", thread.deal, thread, why))
        self.desk.close_if_over(thread.deal, step, now_ms=now_ms)

    def _keep(self, ask: Ask) -> None:
        self.asks[ask.request_id] = self._live_asks[ask.request_id] = ask
        while len(self.asks) > ASKS_MAX + len(self._live_asks):
            over = next(key for key in self.asks if key not in self._live_asks)
            del self.asks[over]

    def _live(self, ask: Ask) -> list[Thread]:
        threads = (self.desk.threads.get(deal) for deal in ask.offers)
        return [thread for thread in threads if thread is not None]

    def _decide(self, ask: Ask, step: Step, *, now_ms: int) -> None:
        if ask.state is not AskState.OPEN or ask.deciding:
            return  # What a decision brings about, it also takes into account.
        ask.deciding = True
        try:
            self._weigh(ask, step, now_ms=now_ms)
        finally:
            ask.deciding = False
            # Whatever else happens is told to the strategy; only the clock is not.
            ask.closing_ms = max(ask.strategy.next_ms() or 0, now_ms + CLOSING_PAUSE_MS)

    def _weigh(self, ask: Ask, step: Step, *, now_ms: int) -> None:
        closing = now_ms >= ask.closes_ms
        again = True
        while again and ask.state is AskState.OPEN:
            offers = self._open_offers(ask)
            if not offers and ask.strategy.next_ms() is None:
                break
            decisions = ask.strategy.decide(
                offers, closing=closing, opened_ms=ask.opened_ms, now_ms=now_ms
            )
            done = [self._try(ask, decision, step, now_ms=now_ms) for decision in decisions]
            # What could not be done makes room for the next best, as long as there is one.
            again = not all(done) and len(self._open_offers(ask)) < len(offers)
        if closing and ask.state is AskState.OPEN and not self._live(ask):
            why = "nobody made an offer"
            if ask.bids:
                why = TOO_DEAR if ask.dear == ask.bids else "no offer was acceptable"
            self._end(ask, str(ask.unpaid) if ask.unpaid else why, step)

    def _open_offers(self, ask: Ask) -> list[Thread]:
        return [thread for thread in self._live(ask) if thread.state is State.OFFERED]

    def _try(self, ask: Ask, decision: Decision, step: Step, *, now_ms: int) -> bool:
        """Do what was decided; return False if it could not be done."""
        thread = self.desk.threads.get(decision.deal)
        if thread is None or thread.state not in (State.OFFERED, State.COUNTERED):
            return True  # It lapsed, or was taken back, while we thought.
        if ask.state is not AskState.OPEN and decision.verdict is not Verdict.REJECT:
            return True  # One was accepted already.
        if decision.unpaid:
            self._unpaid(ask, thread, now_ms=now_ms)
        try:
            self._act(ask, thread, decision, step, now_ms=now_ms)
            return True
        except BudgetExhausted as error:
            ask.unpaid = error
            ask.strategy.undone(thread.deal)
            step.effects.append(Notice("budget_exhausted", thread.deal, thread, str(error)))
            self._reject(thread, "not this time", step, now_ms=now_ms)
        except LocalProtocolError as error:
            # A strategy may propose what the rules forbid; that must not stop the desk.
            ask.strategy.undone(thread.deal)
            step.effects.append(Notice("bad_decision", thread.deal, thread, str(error)))
        return False

    def _unpaid(self, ask: Ask, thread: Thread, *, now_ms: int) -> None:
        """Remember which limit does not cover the offer in ``thread``."""
        units = exposure(thread.agreed_terms)
        account = thread.charge.account
        short = self.reserve.shortfall(units, thread.counterparty, now_ms=now_ms, account=account)
        if short is None:
            try:
                self.means.accept(units)
            except BudgetExhausted as error:
                short = error
        ask.unpaid = short or ask.unpaid

    def _reject(self, thread: Thread, reason: str, step: Step, *, now_ms: int) -> None:
        kind, body = "withdraw", {"reason": reason}
        if thread.state is State.OFFERED:
            kind, body = "reject", {"proposal": thread.proposal_id, "reason": reason}
        self.desk.say(thread.deal, kind, dict(body), step, now_ms=now_ms, re=thread.proposal_id)
        self.desk.close_if_over(thread.deal, step, now_ms=now_ms)

    def _act(
        self, ask: Ask, thread: Thread, decision: Decision, step: Step, *, now_ms: int
    ) -> None:
        match decision.verdict:
            case Verdict.REJECT:
                self._reject(thread, decision.reason or "not this time", step, now_ms=now_ms)
            case Verdict.COUNTER:
                terms = counter_terms(thread.agreed_terms, decision)
                body: dict[str, object] = {
                    "answers": thread.proposal_id,
                    "terms": terms_to_wire(terms),
                    "valid_until_ms": now_ms + COUNTER_VALID_MS,
                }
                self.desk.say(
                    thread.deal, "counter", body, step, now_ms=now_ms, re=thread.proposal_id
                )
            case Verdict.ACCEPT:
                agree_by_ms = decision.until_ms or now_ms + AGREE_WITHIN_MS
                self._accept(ask, thread, agree_by_ms, step, now_ms=now_ms)
            case Verdict.WAIT:
                return

    def _accept(
        self, ask: Ask, thread: Thread, agree_by_ms: int, step: Step, *, now_ms: int
    ) -> None:
        if unlockable(thread.agreed_terms, self.desk.margins, now_ms=now_ms):
            raise LocalProtocolError("there is no time left to lock")
        units = exposure(thread.agreed_terms)
        # What lies in a channel already need not be in the purse as well.
        ready = self.desk.streams.free_units(thread.counterparty) if thread.streamed else 0
        if units > ready:
            self.means.accept(units - ready)
        account = thread.charge.account
        if units:
            self.reserve.reserve(
                thread.deal, units, thread.counterparty, now_ms=now_ms, account=account
            )
        digest = thread.agreed_terms.digest(self.desk.domain)
        body: dict[str, object] = {
            "offer": thread.proposal_id,
            "terms_digest": "0x" + digest.hex(),
            "agree_by_ms": agree_by_ms,
        }
        try:
            self.desk.say(
                thread.deal,
                "accept",
                body,
                step,
                now_ms=now_ms,
                re=thread.proposal_id,
                until_ms=agree_by_ms,
            )
        except LocalProtocolError:
            self.reserve.release(thread.deal, now_ms=now_ms)
            raise
        ask.state, ask.chosen = AskState.ACCEPTING, thread.deal

    def _turn_away(self, ask: Ask, step: Step, *, now_ms: int) -> None:
        """Tell the other bidders, so that they need not hold anything for us."""
        for thread in self._live(ask):
            if thread.deal == ask.chosen or thread.state not in (State.OFFERED, State.COUNTERED):
                continue
            body: dict[str, object] = {"reason": "another offer was taken"}
            self.desk.say(thread.deal, "withdraw", body, step, now_ms=now_ms, re=thread.proposal_id)
            self.desk.close_if_over(thread.deal, step, now_ms=now_ms)

    def call(
        self, contract: Thread, wish: Wish, request_id: str = "", *, now_ms: int
    ) -> tuple[Ask, Step]:
        """Order work under a rate contract of ours: its deal begins at once, and nobody is asked.

        ``input_max`` and ``output_max`` of the wish are the call's. What it may cost is set aside
        as for every deal.

        :raises LocalProtocolError: if the contract is over or does not cover it, its channel does
            not hold the price, or the task is too large for one message; nothing was begun
        :raises BudgetExhausted: if a limit of the purse does not cover it; nothing was begun
        """
        desk, salt = self.desk, self.desk.chance.take(32)
        request_id = request_id or desk.chance.take(16).hex()
        if contract.deal not in desk.threads:
            raise LocalProtocolError("the rate contract is over")
        units = call_units(
            contract.agreed_terms, input_max=wish.input_max, output_max=wish.output_max
        )
        if size_as_json(wish.task) + CALL_HEAD_MAX_BYTES > BODY_INLINE_MAX_BYTES:
            raise LocalProtocolError("the task is too large to be called for")
        lock_by_s = now_ms // 1000 + lock_within_s(desk.margins.chain_s)
        lock_by_s = min(lock_by_s, contract.agreed_terms.lock_by_s)
        call = RateCall(
            salt="0x" + salt.hex(),
            task=wish.task,
            withdraw_delay_s=0,
            channel_salt=ZERO_BYTES32_TEXT,
            number=desk.standing.next_number(contract.deal),
            lock_by_s=lock_by_s,
            price_units=str(units),
            input_max=wish.input_max,
            output_max=wish.output_max,
        )
        try:
            opened = called(contract, call, now_ms=now_ms)
        except RemoteProtocolError as error:
            raise LocalProtocolError(str(error)) from error
        opened = replace(opened, request_id=request_id, charge=wish.charge)
        if unlockable(opened.agreed_terms, desk.margins, now_ms=now_ms):
            raise LocalProtocolError("the rate contract is nearly over")
        if opened.method == "channel":
            if desk.streams.ready_units(opened) < units:
                raise LocalProtocolError("the channel does not hold the price of the call")
            self.reserve.reserve(
                opened.deal,
                units,
                opened.counterparty,
                now_ms=now_ms,
                account=wish.charge.account,
            )
        return self._called(opened, wish, salt, now_ms=now_ms)

    def _called(self, opened: Thread, wish: Wish, salt: bytes, *, now_ms: int) -> tuple[Ask, Step]:
        """Begin the deal of a call, as if its request had been asked and answered."""
        step = Step()
        task = "0x" + opened.agreed_terms.work.task.hex()
        request = opened.request.model_copy(update={"task": task})
        ask = Ask(opened.request_id, wish, salt, opened.secret, request, now_ms, DeclineAll())
        ask.state, ask.chosen = AskState.BOUND, opened.deal
        ask.offers, ask.bids = [opened.deal], 1
        self._keep(ask)
        self._record_ask(ask, step, now_ms=now_ms)
        self.desk.open_thread(opened, step, now_ms=now_ms)
        step.effects.append(Notice("agreed", opened.deal, opened))
        self.desk.pursue(opened.deal, step, now_ms=now_ms)
        return ask, step

    def send_task(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        """Send the task of a locked deal to the seller who won it."""
        ask = self.asks.get(thread.request_id)
        if ask is None:
            raise LocalProtocolError(f"the task of request {thread.request_id} is not known")
        terms = thread.agreed_terms
        body: dict[str, object] = {
            "salt": "0x" + ask.salt.hex(),
            "task": ask.wish.task,
            **self.desk.streams.task_fields(thread),
        }
        kind, until_ms = "task", terms.deliver_by_s * 1000
        if thread.contract:
            kind = "call"
            body |= {
                "number": thread.number,
                "lock_by_s": terms.lock_by_s,
                "price_units": str(terms.price_units),
                "input_max": terms.work.input_max,
                "output_max": terms.work.output_max,
            }
        self.desk.say(
            thread.deal, kind, body, step, now_ms=now_ms, re=thread.contract, until_ms=until_ms
        )

    def ticked(self, step: Step, *, now_ms: int) -> None:
        """Repeat requests that have too few bids, and close rounds whose time is up."""
        for ask in list(self._live_asks.values()):
            if ask.state is not AskState.OPEN:
                continue
            self._repeat(ask, step, now_ms=now_ms)
            if now_ms >= max(ask.closes_ms, ask.closing_ms):
                self._decide(ask, step, now_ms=now_ms)

    def next_ms(self) -> int | None:
        """Return when the next repetition or closing is due."""
        times = []
        for ask in self._live_asks.values():
            if ask.state is AskState.OPEN:
                times.append(max(ask.closes_ms, ask.closing_ms))
                if (again_ms := self._again_ms(ask)) is not None:
                    times.append(again_ms)
        return min(times, default=None)

    def opening(self, thread: Thread, *, now_ms: int) -> None:
        """Let the money of a deal go into the escrow.

        :raises BudgetExhausted: if the purse did not set it aside, or the agent's tokens do not
            cover it any more; then it must not be locked
        """
        self.means.open(thread)
        self.reserve.lock(thread.deal, now_ms=now_ms)

    def paying(self, thread: Thread, units: int, *, now_ms: int) -> None:
        """Let the key sign for ``units`` of a deal in all, by vouchers.

        :raises BudgetExhausted: if so much was not set aside for it; then nothing is signed
        """
        if thread.method == "none":
            return
        self.reserve.require(thread.deal, units)
        self.reserve.lock(thread.deal, now_ms=now_ms)

    def spare_units(self, counterparty: AgentId, *, now_ms: int) -> int | None:
        """Return how much more may lie ready for deals with ``counterparty``; None for any."""
        rooms = self.rooms(counterparty, now_ms=now_ms)
        return max(0, min(rooms.values())) if rooms else None

    def is_spending(self) -> bool:
        """Return whether something may be accepted or locked soon."""
        if any(ask.state is not AskState.BOUND for ask in self._live_asks.values()):
            return True
        return any(t.side is Role.BUYER and t.state is State.AGREED for t in self.under_way())

    def know(self, units: int | None) -> None:
        """Take note of what the agent's address holds, or with None that it cannot be told."""
        self.means.know(units)

    def under_way(self) -> list[Thread]:
        """Return the deals that are accepted or signed, and not over."""
        chosen = [ask.chosen for ask in self._live_asks.values() if ask.chosen]
        deals = dict.fromkeys((*chosen, *self.desk.bound()))
        threads = (self.desk.threads.get(deal) for deal in deals)
        return [thread for thread in threads if thread is not None and not thread.is_contract]

    @property
    def limited(self) -> bool:
        """Whether there is any limit to what may be spent."""
        return self.reserve.limited or bool(self.means.rooms())

    def rooms(self, counterparty: AgentId, *, now_ms: int, account: str = "") -> dict[str, int]:
        """Return what each limit that concerns a deal with ``counterparty`` has left."""
        rooms = self.reserve.rooms(counterparty, now_ms=now_ms, account=account)
        return rooms | self.means.rooms()

    def judged(self, thread: Thread, *, now_ms: int) -> None:
        """Remember a result, good or bad, of a seller."""
        outcome = Outcome.DELIVERED if thread.verdict == "good" else Outcome.UNDELIVERED
        self._judged.add(thread.deal)
        self._mark(thread, outcome, now_ms=now_ms)

    def _mark(self, thread: Thread, outcome: Outcome, *, now_ms: int) -> None:
        capability = thread.request.capability
        self.experience.mark(thread.counterparty, capability, outcome, now_ms=now_ms)

    def ended(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        """Go on with the next best offer if the chosen one came to nothing."""
        self.reserve.spend(thread.deal, spent_in(thread), now_ms=now_ms)
        self._learn(thread, now_ms=now_ms)
        ask = self.asks.get(thread.request_id)
        if ask is None or ask.state is AskState.ENDED:
            return
        ask.strategy.ended(thread, now_ms=now_ms)
        if thread.deal == ask.chosen:
            if thread.state is State.LAPSED and ask.state is AskState.ACCEPTING:
                ask.state, ask.chosen = AskState.OPEN, ""
                self._decide(ask, step, now_ms=now_ms)
                return
            ask.outcome = thread
            self._end(ask, thread.why, step)
        elif ask.state is AskState.OPEN:
            self._decide(ask, step, now_ms=now_ms)

    def _learn(self, thread: Thread, *, now_ms: int) -> None:
        """Remember how a deal ended; how an accept ended is the strategy's to tell."""
        judged = thread.deal in self._judged
        self._judged.discard(thread.deal)
        outcome = outcome_of(thread)
        if outcome is None or outcome in (Outcome.SILENT, Outcome.DECLINED):
            return
        if not judged or outcome is Outcome.DISPUTE_LOST:
            self._mark(thread, outcome, now_ms=now_ms)

    def give_up(self, request_id: str, *, now_ms: int) -> Step:
        """End a request that nobody wants any more, unless an offer was accepted already."""
        step, ask = Step(), self.asks.get(request_id)
        if ask is not None and ask.state is AskState.OPEN:
            self._turn_away(ask, step, now_ms=now_ms)
            self._end(ask, "it was given up", step)
        return step

    def _end(self, ask: Ask, why: str, step: Step) -> None:
        ask.state, ask.why = AskState.ENDED, why
        self._live_asks.pop(ask.request_id, None)
        step.closed.append((ask.request_id, b""))
        step.effects.append(Notice("request_ended", ask.request_id, ask.outcome, why))

    def replay(self, record: Record, strategy: BuyerStrategy) -> None:
        """Take a request of ours out of the journal."""
        row = json.loads(record.data)
        request = Request.model_validate_json(row["request"])
        wish = Wish(
            capability=request.capability,
            schemas=bytes.fromhex(request.schemas[2:]),
            task=row["task"],
            input_schema=row["schemas"][0],
            output_schema=row["schemas"][1],
            features=request.features,
            deliver_within_s=request.deliver_within_s,
            bids_min=request.bids_min,
            bids_max=request.bids_max,
            kept=row.get("kept", True),
        )
        chances = bytes.fromhex(row["salt"]), bytes.fromhex(row["secret"])
        ask = Ask(record.deal, wish, *chances, request, record.at_ms, strategy)
        ask.sent = len(REQUEST_REPEATS_MS)  # Bidders of the first life are gone.
        self._keep(ask)

    def replayed(self, summaries: Iterable[Mapping[str, Any]] = ()) -> None:
        """Find out, after the whole journal was folded, where each request and the purse stand.

        ``summaries`` are those of the deals that are over.
        """
        rows = list(summaries)
        self.experience.recall(rows)
        self.reserve.recall(self.desk.threads.values(), rows)
        for thread in self.desk.threads.values():
            if thread.side is not Role.BUYER:
                continue
            if thread.verdict:
                self.judged(thread, now_ms=thread.history[-1].at_ms)
            ask = self.asks.get(thread.request_id)
            if ask is None:
                continue
            ask.offers.append(thread.deal)
            ask.bids += 1
            if thread.accept_id:
                ask.chosen = thread.deal
                accepting = thread.state is State.ACCEPTED
                ask.state = AskState.ACCEPTING if accepting else AskState.BOUND


def counter_terms(terms: Terms, decision: Decision) -> Terms:
    """Return the buyer's counter-proposal: the seller's terms with what the decision changes."""
    price, deliver_within_s = decision.price_units, decision.deliver_within_s
    work, arbiter = terms.work, terms.arbiter
    streamed = work.settlement in STREAMED  # How it is paid was offered, and stays.
    if (proposal := decision.proposal) is not None:
        price, deliver_within_s = proposal.price_units, proposal.deliver_within_s
        arbiter = ZERO_ADDRESS if streamed else proposal.arbiter
        work = replace(
            work,
            quality=proposal.quality,
            verification=proposal.verification,
            input_price_units=proposal.input_price_units,
            cached_input_price_units=proposal.cached_input_price_units,
            output_price_units=proposal.output_price_units,
            second_price_units=proposal.second_price_units,
        )
    scaled = terms.bond_units * price // terms.price_units if terms.price_units else 0
    deliver_by_s = terms.lock_by_s + deliver_within_s if deliver_within_s else terms.deliver_by_s
    return replace(
        terms,
        work=work,
        arbiter=arbiter,
        price_units=price,
        bond_units=min(scaled, price),
        default_to_seller_units=0 if streamed else price // 2,
        deliver_by_s=deliver_by_s,
    )
