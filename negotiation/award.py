"""One request, many offers: rank them, bargain with the best few, accept one, free the rest.

A ``Round`` is a value. What happens is told to it (``offered``, ``refused``, ``agreed``), and
``step`` returns what to do now together with the round as it is after that. It holds at most one
accept at a time: until the seller has confirmed or ``agree_by`` has passed, the price stays
reserved and nobody else is accepted. Silence lowers the seller's score, and the next best gets
the accept. The others are turned away only when somebody has agreed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import ConfigurationError, LocalProtocolError, Refused
from coase.protocol.identity import keccak256
from coase.protocol.messages import BIDS_MAX, ROUNDS_MAX
from coase.protocol.states import Role

from .policy import Forbidden, Policy, decide
from .scores import Outcome, Scorebook
from .strategy import Accept, Counter, Move, Strategy, Turn, View, Walk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coase.protocol.types import AgentId

    from .issues import Proposal
    from .pricing import Usage

AGREE_WITHIN_MS: Final = 5_000  # A seller signs in milliseconds; the rest is the network.
ANSWER_WITHIN_MS: Final = 10_000
PATIENCE_MS: Final = 500  # How long a good offer waits for a better-ranked thread to come round.
# An accept has to arrive before the offer lapses: a good offer is not kept waiting beyond this.
ACCEPT_MARGIN_MS: Final = 1_000


@dataclass(frozen=True, slots=True)
class AcceptOffer:
    """Accept the offer that lies in ``thread``; its price is reserved until ``agree_by_ms``."""

    thread: str
    proposal: Proposal
    agree_by_ms: int


@dataclass(frozen=True, slots=True)
class CounterOffer:
    """Answer the offer in ``thread`` with ``proposal``."""

    thread: str
    proposal: Proposal


@dataclass(frozen=True, slots=True)
class RejectOffer:
    """End ``thread``. ``reason`` may be sent; ``detail`` is for our own log.

    ``limit`` names the limit of the policy that stood in the way, if one did.
    """

    thread: str
    reason: str
    detail: str = ""
    limit: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """An outcome to record in the score book that the agent's rounds share."""

    seller: AgentId
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing more to do before ``until_ms``, unless something happens."""

    until_ms: int


@dataclass(frozen=True, slots=True)
class Fail:
    """The round ended without a deal, and why."""

    reason: str


Decision = AcceptOffer | CounterOffer | RejectOffer | Mark | Wait | Fail


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many are asked and bargained with, and how long each is waited for.

    ``rounds`` is how many proposals are made in one thread; none is take it or leave it.

    With ``by_rounds`` time does not count: proposals are compared and answered when every thread
    that owes an answer has given it or has run out of time, and the strategy does not see the
    clock. The same offers then lead to the same moves, in whichever order and however late they
    come.

    :raises ConfigurationError: if a number is out of its range
    """

    bids_min: int = 1
    bids_max: int = 16
    spare: int = 0
    """Offers that are taken in beyond ``bids_max``, such as those that are too dear as yet."""
    bargain_with: int = 3
    agree_within_ms: int = AGREE_WITHIN_MS
    answer_within_ms: int = ANSWER_WITHIN_MS
    patience_ms: int = PATIENCE_MS
    rounds: int = ROUNDS_MAX - 1
    by_rounds: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bids_min <= self.bids_max <= BIDS_MAX:
            raise ConfigurationError(f"1 <= bids_min <= bids_max <= {BIDS_MAX} must hold")
        if not 0 <= self.spare <= BIDS_MAX:
            raise ConfigurationError(f"spare offers are from 0 to {BIDS_MAX}")
        if not 1 <= self.bargain_with <= self.bids_max:
            raise ConfigurationError("bargain_with is from 1 to bids_max")
        if min(self.agree_within_ms, self.answer_within_ms) < 1 or self.patience_ms < 0:
            raise ConfigurationError("waits are positive numbers of milliseconds")
        if not 0 <= self.rounds < ROUNDS_MAX:
            raise ConfigurationError(f"rounds are from 0 to {ROUNDS_MAX - 1}")


@dataclass(frozen=True, slots=True)
class Ranked:
    """Where one offer stands and what it is expected to cost in all."""

    thread: str
    seller: AgentId
    cost_units: int
    price_units: int
    failure_permille: int
    tie: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Orders offers by total expected cost, all in units of the asset.

    The cost is the expected price, and what a second of waiting and each grade below 100 are
    worth, and the chance of failure times having it all done again plus ``failure_units``.
    Equal costs are ordered by a hash with ``salt``, so that nobody can choose an address or a
    moment that wins ties.
    """

    second_units: int = 0
    grade_units: int = 0
    failure_units: int = 0
    usage: Usage | None = None
    """What metered work is expected to use; without it the whole cap counts."""
    salt: bytes = b""

    def rank(
        self,
        offers: Mapping[str, tuple[AgentId, Proposal]],
        scores: Scorebook,
        capability: str,
        *,
        now_ms: int,
    ) -> list[Ranked]:
        """Return the offers, cheapest first; the order in which they came does not matter."""
        ranked = [
            self._ranked(
                thread,
                seller,
                proposal,
                scores.failure_permille(seller, capability, now_ms=now_ms),
            )
            for thread, (seller, proposal) in offers.items()
        ]
        return sorted(ranked, key=lambda row: (row.cost_units, row.failure_permille, row.tie))

    def _ranked(
        self, thread: str, seller: AgentId, proposal: Proposal, failure_permille: int
    ) -> Ranked:
        price = proposal.price_units
        if self.usage is not None:
            price = proposal.tariff.charge_units(self.usage, cap_units=price)
        cost = price + self.second_units * proposal.deliver_within_s
        cost += self.grade_units * (100 - proposal.quality)
        # Up: a doubt is never rounded away.
        again = -(-(cost + self.failure_units) * failure_permille // (1_000 - failure_permille))
        tie = keccak256(self.salt + f"{seller}|{thread}".encode())
        return Ranked(thread, seller, cost + again, price, failure_permille, tie)


class EntryState(StrEnum):
    """Where one thread of a round stands."""

    OFFERED = "offered"
    COUNTERED = "countered"
    ACCEPTED = "accepted"
    AGREED = "agreed"
    OUT = "out"


_LIVE: Final = (EntryState.OFFERED, EntryState.COUNTERED)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thread of a round."""

    thread: str
    seller: AgentId
    state: EntryState
    history: tuple[Turn, ...]
    since_ms: int

    @property
    def last_offer(self) -> Turn:
        """What the seller said last."""
        return next(turn for turn in reversed(self.history) if turn.by is Role.SELLER)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Round:
    """One request of a buyer, from the first offer to the agreement.

    ``reply_by_ms`` ends the wait for offers, ``deadline_ms`` the whole round. Offers are weighed
    as soon as ``bids_min`` are there.
    """

    strategy: Strategy
    policy: Policy
    ranking: Ranking
    plan: Plan = Plan()
    capability: str
    scores: Scorebook = field(default_factory=Scorebook)
    opened_ms: int
    reply_by_ms: int
    deadline_ms: int
    accepted: str = ""
    """The thread whose accept is not yet confirmed, or the one that agreed."""
    agree_by_ms: int = 0
    good_since_ms: int = -1
    """Since when an offer that could be accepted waits for a better one."""
    over: bool = False
    entries: Mapping[str, Entry] = field(default_factory=lambda: MappingProxyType({}))

    def __repr__(self) -> str:
        states = ", ".join(f"{name}: {entry.state}" for name, entry in self.entries.items())
        return f"<Round of {self.capability}: {states or 'no offers'}>"

    @property
    def reserved_units(self) -> int:
        """What has to stay reserved: the price of the accept until it is answered or lapses."""
        if not self.accepted or self.entries[self.accepted].state is not EntryState.ACCEPTED:
            return 0
        return self.entries[self.accepted].last_offer.proposal.price_units

    def offered(
        self, thread: str, seller: AgentId, proposal: Proposal, *, valid_until_ms: int, now_ms: int
    ) -> Round:
        """Return the round with one more offer, or with the seller's answer to a counter-offer.

        The same offer twice changes nothing.

        :raises Refused: if the round takes no more offers, or none from this seller
        """
        turn = Turn(Role.SELLER, proposal, now_ms, valid_until_ms)
        known = self.entries.get(thread)
        if known is None:
            _admit(self, seller, now_ms)
            return _with(self, Entry(thread, seller, EntryState.OFFERED, (turn,), now_ms))
        if known.seller != seller:
            raise Refused("wrong_state", "another seller's thread")
        if known.state is not EntryState.COUNTERED:
            if known.last_offer.proposal == proposal:
                return self
            raise Refused("wrong_state", f"the thread is {known.state} and awaits no offer")
        return _with(
            self,
            replace(
                known, state=EntryState.OFFERED, history=(*known.history, turn), since_ms=now_ms
            ),
        )

    def refused(self, thread: str, *, now_ms: int) -> tuple[Round, list[Decision]]:
        """Return the round after the seller said no, withdrew, or refused the accept.

        A no to an accept frees the reservation at once, and counts a little against the seller.
        """
        entry = self.entries.get(thread)
        if entry is None or entry.state in (EntryState.OUT, EntryState.AGREED):
            return self, []
        after = _with(self, replace(entry, state=EntryState.OUT))
        if entry.state is not EntryState.ACCEPTED:
            return after, []
        return _marked(after, entry.seller, Outcome.DECLINED, now_ms)

    def dropped(self, thread: str) -> Round:
        """Return the round without a thread that we ended, or in which we could not act.

        An accept that could not be said reserves nothing, and its seller is not to blame.
        """
        entry = self.entries.get(thread)
        if entry is None or entry.state in (EntryState.OUT, EntryState.AGREED):
            return self
        after = _with(self, replace(entry, state=EntryState.OUT))
        if entry.state is not EntryState.ACCEPTED:
            return after
        return replace(after, accepted="", agree_by_ms=0)

    def agreed(self, thread: str) -> tuple[Round, list[Decision]]:
        """Return the round after the seller confirmed, and whom to turn away.

        A late yes is a yes as long as the accept was not given up: nobody else has one.

        :raises LocalProtocolError: if this thread was not accepted, or its accept was given up
        """
        entry = self.entries.get(thread)
        if entry is not None and entry.state is EntryState.AGREED:
            return self, []
        if entry is None or entry.state is not EntryState.ACCEPTED:
            raise LocalProtocolError(f"thread {thread} has no accept that could be confirmed")
        after = _with(self, replace(entry, state=EntryState.AGREED))
        return _ended(after, "another offer was taken")

    def step(self, now_ms: int) -> tuple[Round, list[Decision]]:
        """Return what to do now, and the round after it.

        Called again at the same time with nothing new it gives a ``Wait`` at most.

        :raises PolicyExhausted: if the policy could not decide on a move
        """
        if self.over:
            return self, []
        if self.accepted and now_ms < self.agree_by_ms:
            return self, [Wait(self.agree_by_ms)]
        after, decisions = _silenced(self, now_ms)
        after, lapsed = _lapsed(after, now_ms)
        decisions += lapsed
        if now_ms >= self.deadline_ms:
            after, last = _failed(after, "the time for the whole request ran out")
        else:
            after, last = _onward(after, now_ms)
        return after, decisions + last

    def ranked(self, *, now_ms: int) -> list[Ranked]:
        """Return the live offers in their order, to act on or to show."""
        live = {
            entry.thread: (entry.seller, entry.last_offer.proposal)
            for entry in self.entries.values()
            if entry.state in _LIVE
            and self.scores.rests_until_ms(entry.seller, self.capability) <= now_ms
        }
        return self.ranking.rank(live, self.scores, self.capability, now_ms=now_ms)


def _admit(past: Round, seller: AgentId, now_ms: int) -> None:
    if past.over:
        raise Refused("expired", "the request is over")
    if now_ms >= past.reply_by_ms:
        raise Refused("expired", "the request takes no more offers")
    if len(past.entries) >= past.plan.bids_max + past.plan.spare:
        raise Refused("capacity", "no more offers are read for this request")
    if any(entry.seller == seller for entry in past.entries.values()):
        raise Refused("capacity", "one thread for each seller")


def _with(past: Round, entry: Entry, **changes: object) -> Round:
    entries = MappingProxyType({**past.entries, entry.thread: entry})
    return replace(past, entries=entries, **changes)  # type: ignore[arg-type]


def _marked(
    past: Round, seller: AgentId, outcome: Outcome, now_ms: int
) -> tuple[Round, list[Decision]]:
    scores = past.scores.record(seller, past.capability, outcome, now_ms=now_ms)
    after = replace(past, scores=scores, accepted="", agree_by_ms=0)
    return after, [Mark(seller, outcome)]


def _silenced(past: Round, now_ms: int) -> tuple[Round, list[Decision]]:
    """Give up an accept that nobody confirmed in time."""
    if not past.accepted:
        return past, []
    entry = past.entries[past.accepted]
    after = _with(past, replace(entry, state=EntryState.OUT))
    return _marked(after, entry.seller, Outcome.SILENT, now_ms)


def _lapsed(past: Round, now_ms: int) -> tuple[Round, list[Decision]]:
    """Drop offers that no longer stand and sellers that did not answer a counter-offer."""
    after = past
    decisions: list[Decision] = []
    for entry in past.entries.values():
        if entry.state in _LIVE and now_ms >= _stands_until_ms(past, entry):
            after = _with(after, replace(entry, state=EntryState.OUT))
            if entry.state is EntryState.COUNTERED:
                decisions.append(RejectOffer(entry.thread, "no answer in time"))
    return after, decisions


def _stands_until_ms(past: Round, entry: Entry) -> int:
    if entry.state is EntryState.COUNTERED:
        return entry.since_ms + past.plan.answer_within_ms
    return entry.last_offer.valid_until_ms


def _onward(past: Round, now_ms: int) -> tuple[Round, list[Decision]]:
    more_may_come = now_ms < past.reply_by_ms and len(past.entries) < past.plan.bids_max
    if more_may_come and len(past.entries) < past.plan.bids_min:
        return past, [_wait(past, past.reply_by_ms)]
    if past.plan.by_rounds and _countered_ones(past):
        return past, [_wait(past, past.deadline_ms)]
    after, moves, decisions = _moves(past, now_ms)
    order = after.ranked(now_ms=now_ms)
    if not order:
        rests_ms = _rests_ms(after)
        if more_may_come or rests_ms:
            times = [*rests_ms, *([past.reply_by_ms] if more_may_come else [])]
            return after, [*decisions, _wait(after, min(times))]
        after, last = _failed(after, _why_nobody(after))
        return after, decisions + last
    until_ms = past.deadline_ms
    good = next((row for row in order if isinstance(moves.get(row.thread), Accept)), None)
    if good is None:
        after = replace(after, good_since_ms=-1)
    else:
        if after.good_since_ms < 0:
            after = replace(after, good_since_ms=now_ms)
        until_ms = _patient_until_ms(after, good, order, moves)
        if now_ms >= until_ms:
            after, accepted = _take(after, good, now_ms)
            return after, decisions + accepted
    for thread, move in moves.items():
        if isinstance(move, Counter):
            after = _countered(after, thread, move.proposal, now_ms)
            decisions.append(CounterOffer(thread, move.proposal))
    return after, [*decisions, _wait(after, until_ms)]


def _moves(past: Round, now_ms: int) -> tuple[Round, dict[str, Move], list[Decision]]:
    """Ask the strategy about the best few; who is turned away makes room for the next."""
    after = past
    moves: dict[str, Move] = {}
    decisions: list[Decision] = []
    room = past.plan.bargain_with - _countered_ones(past)
    for row in past.ranked(now_ms=now_ms):
        entry = past.entries[row.thread]
        if room <= 0 or entry.state is not EntryState.OFFERED:
            continue
        view = _view(past, entry, now_ms)
        move = decide(past.strategy, past.policy, view)
        if isinstance(move, (Walk, Forbidden)):
            limit, why = ("", move.reason) if isinstance(move, Walk) else (move.limit, move.why)
            after = _with(after, replace(entry, state=EntryState.OUT))
            decisions.append(RejectOffer(row.thread, "not acceptable", why, limit))
            continue
        moves[row.thread] = move
        room -= 1
    return after, moves, decisions


def _view(past: Round, entry: Entry, now_ms: int) -> View:
    tie = keccak256(past.ranking.salt + entry.thread.encode())
    made = sum(turn.by is Role.BUYER for turn in entry.history)
    return View(
        role=Role.BUYER,
        history=entry.history,
        started_ms=past.opened_ms,
        deadline_ms=past.deadline_ms,
        now_ms=past.opened_ms if past.plan.by_rounds else now_ms,
        rounds_left=max(past.plan.rounds - made, 0),
        seed=int.from_bytes(tie[:4], "big"),
        counterparty=entry.seller,
        capability=past.capability,
    )


def _patient_until_ms(
    past: Round, good: Ranked, order: list[Ranked], moves: Mapping[str, Move]
) -> int:
    """Return how long the best acceptable offer waits for a thread that ranks before it."""
    before = {row.thread for row in order[: order.index(good)]}
    hoped = any(
        past.entries[thread].state is EntryState.COUNTERED or isinstance(moves.get(thread), Counter)
        for thread in before
    )
    if not hoped:
        return 0
    stands_until_ms = past.entries[good.thread].last_offer.valid_until_ms - ACCEPT_MARGIN_MS
    if past.plan.by_rounds:
        return stands_until_ms
    return min(past.good_since_ms + past.plan.patience_ms, stands_until_ms)


def _take(past: Round, good: Ranked, now_ms: int) -> tuple[Round, list[Decision]]:
    entry = past.entries[good.thread]
    agree_by_ms = min(now_ms + past.plan.agree_within_ms, past.deadline_ms)
    after = _with(
        past,
        replace(entry, state=EntryState.ACCEPTED, since_ms=now_ms),
        accepted=good.thread,
        agree_by_ms=agree_by_ms,
        good_since_ms=-1,
    )
    proposal = entry.last_offer.proposal
    return after, [AcceptOffer(good.thread, proposal, agree_by_ms), Wait(agree_by_ms)]


def _countered_ones(past: Round) -> int:
    """Return how many threads wait for the seller's answer to a counter-offer."""
    return sum(entry.state is EntryState.COUNTERED for entry in past.entries.values())


def _countered(past: Round, thread: str, proposal: Proposal, now_ms: int) -> Round:
    entry = past.entries[thread]
    turn = Turn(Role.BUYER, proposal, now_ms, now_ms + past.plan.answer_within_ms)
    return _with(
        past,
        replace(entry, state=EntryState.COUNTERED, history=(*entry.history, turn), since_ms=now_ms),
    )


def _wait(past: Round, until_ms: int) -> Wait:
    """Return the wait until ``until_ms``, or until something lapses before that."""
    times = [until_ms, past.deadline_ms]
    times += [_stands_until_ms(past, e) for e in past.entries.values() if e.state in _LIVE]
    return Wait(min(times))


def _rests_ms(past: Round) -> list[int]:
    """Return when each seller that was silent lately may be asked again."""
    live = [entry for entry in past.entries.values() if entry.state in _LIVE]
    return [past.scores.rests_until_ms(entry.seller, past.capability) for entry in live]


def _why_nobody(past: Round) -> str:
    if not past.entries:
        return "nobody made an offer: no seller of this capability heard the request in time"
    return f"none of {len(past.entries)} offers was acceptable, stood long enough and was confirmed"


def _failed(past: Round, reason: str) -> tuple[Round, list[Decision]]:
    after, decisions = _ended(past, "not this time")
    return after, [*decisions, Fail(reason)]


def _ended(past: Round, reason: str) -> tuple[Round, list[Decision]]:
    live = [entry for entry in past.entries.values() if entry.state in _LIVE]
    after = replace(past, over=True)
    for entry in live:
        after = _with(after, replace(entry, state=EntryState.OUT))
    return after, [RejectOffer(entry.thread, reason) for entry in live]
