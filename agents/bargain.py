"""From strategies to moves: what the negotiation package decides, in the words of the desk.

Sellers and buyers here hold the private side of a bargain. Only proposals leave: a reservation
value is given to ``Preferences`` and cannot be read back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, Protocol

from coase.negotiation.award import (
    AcceptOffer,
    CounterOffer,
    EntryState,
    Mark,
    Plan,
    Ranking,
    RejectOffer,
    Round,
    Wait,
)
from coase.negotiation.award import Decision as RoundDecision
from coase.negotiation.issues import Preferences, Proposal
from coase.negotiation.policy import (
    AllowedSettlement,
    AllowedVerification,
    ArbiterList,
    DeadlineLimit,
    Forbidden,
    Limit,
    Policy,
    PriceLimit,
    QualityFloor,
    RoundsMax,
    SpendLimit,
    decide,
)
from coase.negotiation.strategy import (
    Accept,
    Counter,
    FixedPrice,
    Move,
    Reciprocating,
    Strategy,
    TimeDependent,
    Turn,
    View,
)
from coase.protocol.errors import ConfigurationError, LocalProtocolError, Refused
from coase.protocol.states import Role
from coase.protocol.types import ZERO_ADDRESS, AgentId, Asset

from .asks import BuyerStrategy, Decision, Verdict
from .experience import Experience
from .purse import OpenPurse, exposure
from .seller import Quote

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from coase.negotiation.pricing import Price, Tariff
    from coase.protocol.messages import Request
    from coase.protocol.session import Thread
    from coase.protocol.terms import Terms

Style = Literal["fixed", "boulware", "linear", "conceder", "reciprocal"]
STYLES: Final[tuple[Style, ...]] = ("fixed", "boulware", "linear", "conceder", "reciprocal")
BARGAIN_MS: Final = 8_000  # A thread's whole bargain; offers are valid for ten seconds.
# Where no clock counts, a whole round of answers waits for the slowest of them.
ANSWERS_WITHIN_MS: Final = 4_000
ROUNDS_OF_A_BUYER: Final = 3
SHORTLIST: Final = 3
TALKS_MAX: Final = 10_000  # Counter-offers in a seller's mind; offers lapse in seconds.
VERIFICATIONS_OF_A_SELLER: Final = ("schema", "none")
BOULWARE_E_PERMILLE: Final = 300
CONCEDER_E_PERMILLE: Final = 3_000


def strategy_of(style: Style, preferences: Preferences) -> Strategy:
    """Return the strategy that ``style`` names.

    :raises ConfigurationError: if it names none
    """
    match style:
        case "fixed":
            return FixedPrice(preferences)
        case "boulware":
            return TimeDependent(preferences, e_permille=BOULWARE_E_PERMILLE)
        case "linear":
            return TimeDependent(preferences, e_permille=1_000)
        case "conceder":
            return TimeDependent(preferences, e_permille=CONCEDER_E_PERMILLE)
        case "reciprocal":
            return Reciprocating(preferences)
    raise ConfigurationError(f"no strategy is called {style!r}; there are {', '.join(STYLES)}")


def proposal_of(terms: Terms) -> Proposal:
    """Return what of ``terms`` is negotiated."""
    work = terms.work
    return Proposal(
        price_units=terms.price_units,
        deliver_within_s=terms.deliver_by_s - terms.lock_by_s,
        quality=work.quality,
        verification=work.verification,
        settlement=work.settlement,
        arbiter=terms.arbiter,
        input_price_units=work.input_price_units,
        cached_input_price_units=work.cached_input_price_units,
        output_price_units=work.output_price_units,
        second_price_units=work.second_price_units,
    )


@dataclass(slots=True)
class Talk:
    """One thread's bargain from the seller's side: its strategy, and what was proposed so far."""

    strategy: Strategy
    policy: Policy
    started_ms: int
    turns: list[Turn] = field(default_factory=list)

    def reply(
        self, thread: Thread, *, rounds: int, by_rounds: bool, now_ms: int
    ) -> Move | Forbidden:
        """Return our move in answer to the counter-offer that lies in ``thread``."""
        theirs = proposal_of(thread.agreed_terms)
        self.turns.append(Turn(Role.BUYER, theirs, now_ms, thread.valid_until_ms))
        made = sum(1 for turn in self.turns if turn.by is Role.SELLER)
        view = View(
            role=Role.SELLER,
            history=tuple(self.turns),
            started_ms=self.started_ms,
            deadline_ms=self.started_ms + BARGAIN_MS,
            # Counting rounds only makes the bargain repeatable whatever the machine's speed.
            now_ms=self.started_ms if by_rounds else now_ms,
            rounds_left=max(rounds - made, 0),
            counterparty=thread.counterparty,
            capability=thread.request.capability,
        )
        move = decide(self.strategy, self.policy, view)
        if isinstance(move, Counter):
            self.turns.append(Turn(Role.SELLER, move.proposal, now_ms))
        return move


class SellerBargain:
    """Quotes by price list and load, and answers counter-offers by one style."""

    def __init__(
        self,
        price: Price,
        asset: Asset,
        *,
        deliver_within_s: int,
        style: Style = "fixed",
        quality: int = 50,
        model: str = "",
        rounds: int = 4,
        by_rounds: bool = False,
        capacity: int = 8,
    ) -> None:
        price.in_asset(asset)  # Raises now if it is finer than the asset, not in mid-bargain.
        if style not in STYLES:
            raise ConfigurationError(f"no strategy {style!r}; there are {', '.join(STYLES)}")
        self._price, self._asset, self._style = price, asset, style
        self._deliver_within_s, self._quality, self._model = deliver_within_s, quality, model
        self._rounds, self._by_rounds, self._capacity = rounds, by_rounds, capacity
        self._talks: dict[str, Talk] = {}

    def quote(self, request: Request, buyer: str, *, load: int, now_ms: int) -> Quote | None:
        """Return the list price with the mark-up for load, or None if it cannot be done so."""
        if request.deliver_within_s < self._within_s(request):
            return None
        if request.quality_min > self._quality:
            return None
        if request.model and self._model and request.model != self._model:
            return None
        tariff = self._asked(request, load)
        try:
            cap = self._cap(tariff, request)
        except ConfigurationError:
            return None  # Of what is priced by the token it names no size.
        if cap <= 0:
            return None
        verifications = _common(VERIFICATIONS_OF_A_SELLER, request.verifications)
        if not verifications:
            return None
        return Quote(
            price_units=cap,
            deliver_within_s=self._within_s(request),
            quality=self._quality,
            model=self._model,
            verification=verifications[0],
            pricing=tariff.pricing,
            metered=_metered(tariff),
        )

    def _asked(self, request: Request, load: int) -> Tariff:
        """Return what to ask now, with ``load`` jobs under way or promised."""
        load_permille = 1_000 * load // max(self._capacity, 1)
        return self._price.asked(self._asset, load_permille=load_permille)

    def _within_s(self, request: Request) -> int:
        """Return how long the work that ``request`` asks for may take us."""
        return self._deliver_within_s

    def _cap(self, tariff: Tariff, request: Request) -> int:
        return tariff.cap_units(
            input_max=request.input_max,
            output_max=request.output_max,
            seconds_max=self._within_s(request),
        )

    def answer(self, thread: Thread, *, now_ms: int) -> Quote | None:
        """Return the quote that answers the counter-offer in ``thread``, or None to walk away."""
        try:
            talk = self._talks.get(thread.deal) or self._open(thread, now_ms=now_ms)
            move = talk.reply(thread, rounds=self._rounds, by_rounds=self._by_rounds, now_ms=now_ms)
        except ConfigurationError:
            return None  # A counter-offer that names what no proposal can hold.
        if not isinstance(move, Accept | Counter):
            self._talks.pop(thread.deal, None)
            return None
        proposal = move.proposal
        work = thread.agreed_terms.work
        return Quote(
            price_units=proposal.price_units,
            deliver_within_s=proposal.deliver_within_s,
            quality=proposal.quality,
            model=work.model,
            verification=proposal.verification,
            pricing=work.pricing,
            metered={
                "input": proposal.input_price_units,
                "cached_input": proposal.cached_input_price_units,
                "output": proposal.output_price_units,
                "second": proposal.second_price_units,
            },
        )

    def _open(self, thread: Thread, *, now_ms: int) -> Talk:
        terms = thread.agreed_terms
        tariff = self._price.in_asset(self._asset)
        cap = self._cap(tariff, thread.request)
        floor = self._price.floor_units(cap)
        metered = tariff.pricing != "fixed"
        request = thread.request
        # What was quoted comes first; the request allows each of them, or there were no quote.
        quoted = terms.work.verification
        offered = _common(VERIFICATIONS_OF_A_SELLER, request.verifications)
        verifications = (quoted, *(name for name in offered if name != quoted))
        settlements = (terms.work.settlement,)  # How it is paid was offered, and stays.
        preferences = Preferences(
            Role.SELLER,
            price_units=(max(cap, floor), floor),
            deliver_within_s=(self._within_s(request),) * 2,
            # A promise below what the request asks at least would be refused by its own terms.
            quality=(max(self._quality, request.quality_min),) * 2,
            verifications=verifications,
            settlements=settlements,
            arbiters=(terms.arbiter,),
            rates=tariff.rates if metered else None,
            cap_units=cap if metered else 0,
        )
        policy = Policy(
            [
                PriceLimit(Role.SELLER, floor),
                DeadlineLimit(self._within_s(request)),
                QualityFloor(max(self._quality, request.quality_min)),
                AllowedVerification(verifications),
                AllowedSettlement(settlements),
                ArbiterList((terms.arbiter,)),
                RoundsMax(),
            ]
        )
        talk = Talk(strategy_of(self._style, preferences), policy, now_ms)
        # The offer that opened the thread was our first turn.
        talk.turns.append(Turn(Role.SELLER, preferences.opening(), now_ms))
        while len(self._talks) >= TALKS_MAX:  # Nobody ended the oldest; its offers have lapsed.
            del self._talks[next(iter(self._talks))]
        self._talks[thread.deal] = talk
        return talk


def _common(ours: tuple[str, ...], theirs: Collection[str]) -> tuple[str, ...]:
    """Return what both allow, in our own order."""
    return tuple(name for name in ours if name in theirs)


def _metered(tariff: Tariff) -> dict[str, int]:
    rates = tariff.rates
    return {
        "input": rates.input_price_units,
        "cached_input": rates.cached_input_price_units,
        "output": rates.output_price_units,
        "second": rates.second_price_units,
    }


class BuyerBargain(BuyerStrategy):
    """Plays one ``Round``: ranks all offers, bargains with the best few, accepts one at a time.

    ``purse`` is never promised more than it holds. ``experience`` is what the agent knows of
    sellers, and learns. With ``by_rounds`` neither counts in the order of offers, nor does the
    clock, so that the same offers lead to the same moves.
    """

    def __init__(
        self,
        *,
        max_price_units: int,
        hope_permille: int = 500,
        deliver_within_s: int,
        quality_min: int = 0,
        style: Style = "linear",
        arbiters: Collection[str] = (),
        verifications: tuple[str, ...] = ("schema",),
        settlements: tuple[str, ...] = ("escrow",),
        rounds: int = ROUNDS_OF_A_BUYER,
        shortlist: int = SHORTLIST,
        by_rounds: bool = False,
        salt: bytes = b"",
        purse: Rooms | None = None,
        experience: Experience | None = None,
    ) -> None:
        if style not in STYLES:
            raise ConfigurationError(f"no strategy {style!r}; there are {', '.join(STYLES)}")
        self._max_units, self._hope_permille = max_price_units, hope_permille
        self._deliver_within_s, self._quality_min = deliver_within_s, quality_min
        self._style, self._arbiters = style, (*arbiters, ZERO_ADDRESS)
        self._verifications, self._settlements = verifications, settlements
        self._rounds, self._shortlist_max, self._by_rounds = rounds, shortlist, by_rounds
        self._salt = salt
        self._left = _Left(purse or OpenPurse())
        self._experience = experience or Experience()
        self._round: Round | None = None
        self._heard: dict[str, str] = {}
        self._wake_ms: int | None = None

    def decide(
        self, offers: list[Thread], *, closing: bool, opened_ms: int, now_ms: int
    ) -> list[Decision]:
        """Return what to do about the offers that lie open."""
        if self._round is None:
            if not closing or not offers:
                return []
            self._round = self._open(offers, opened_ms=opened_ms)
        self._left.now_ms = now_ms
        past = self._round
        for thread in offers:
            past = self._hear(past, thread)
        if not self._by_rounds:
            past = replace(past, scores=self._experience.book)
        after, decisions = past.step(now_ms)
        self._round, self._wake_ms = after, None
        out = self._told(decisions, now_ms=now_ms)
        spoken = {decision.deal for decision in out}
        for thread in offers:
            # What the round is done with, or never took in, must not lie there as if it counted.
            entry = after.entries.get(thread.deal)
            gone = entry is None or entry.state is EntryState.OUT
            if gone and thread.deal not in spoken:
                out.append(Decision(thread.deal, Verdict.REJECT, reason="not acceptable"))
        return out

    def undone(self, deal: str) -> None:
        """Go on without a thread in which we could not do what we had decided."""
        if self._round is not None:
            self._round = self._round.dropped(deal)

    def agreed(self, thread: Thread) -> None:
        """Take note that the seller confirmed."""
        if self._round is not None:
            try:
                self._round, _ = self._round.agreed(thread.deal)
            except LocalProtocolError:
                return  # An accept of an earlier life of this process.

    def ended(self, thread: Thread, *, now_ms: int) -> None:
        """Take note that a thread is over, whoever ended it."""
        last = thread.history[-1] if thread.history else None
        if self._round is None or (last is not None and last.move == "agree_by"):
            return  # An accept that met with silence: the next step gives it up.
        if last is not None and last.role is Role.BUYER:
            self.undone(thread.deal)
            return
        self._round, decisions = self._round.refused(thread.deal, now_ms=now_ms)
        self._told(decisions, now_ms=now_ms)

    def next_ms(self) -> int | None:
        """Return until when nothing is to be done unless something happens."""
        return self._wake_ms

    def _open(self, offers: list[Thread], *, opened_ms: int) -> Round:
        request = offers[0].request
        best_units = min(thread.agreed_terms.price_units for thread in offers)
        # What no thread's purse covers is not conceded either; each thread is checked by itself.
        rooms = [self._left.most_units(thread) for thread in offers]
        most_units = min([self._max_units, max(rooms)] if self._left.limited else [self._max_units])
        # Below the limit even where the market is above it: an opening must not tell the limit.
        hope_units = max(min(best_units, most_units) * self._hope_permille // 1_000, 1)
        preferences = Preferences(
            Role.BUYER,
            price_units=(min(hope_units, most_units), most_units),
            deliver_within_s=(self._deliver_within_s, self._deliver_within_s),
            quality=(self._quality_min, self._quality_min),
            verifications=self._verifications,
            settlements=self._settlements,
            arbiters=self._arbiters,
        )
        answer_within = {"answer_within_ms": ANSWERS_WITHIN_MS} if self._by_rounds else {}
        return Round(
            strategy=strategy_of(self._style, preferences),
            policy=self._policy(),
            ranking=Ranking(salt=self._salt),
            plan=Plan(
                bids_min=request.bids_min,
                bids_max=request.bids_max,
                spare=request.bids_max,  # That many are read besides which are too dear as yet.
                bargain_with=max(1, min(self._shortlist_max, request.bids_max)),
                rounds=self._rounds,
                by_rounds=self._by_rounds,
                **answer_within,
            ),
            capability=request.capability,
            opened_ms=opened_ms,
            reply_by_ms=request.reply_by_ms,
            deadline_ms=request.reply_by_ms + BARGAIN_MS,
        )

    def _policy(self) -> Policy:
        limits: list[Limit] = [
            PriceLimit(Role.BUYER, self._max_units, clamp=False),
            DeadlineLimit(self._deliver_within_s),
            QualityFloor(self._quality_min),
            AllowedSettlement(self._settlements),
            AllowedVerification(self._verifications),
            ArbiterList(self._arbiters),
            RoundsMax(),
        ]
        return Policy([*limits, SpendLimit(self._left)] if self._left.limited else limits)

    def _hear(self, past: Round, thread: Thread) -> Round:
        """Return the round with the offer that lies in ``thread``, if it is news."""
        if self._heard.get(thread.deal) == thread.proposal_id:
            return past
        self._heard[thread.deal] = thread.proposal_id
        terms = thread.agreed_terms
        self._left.terms[thread.counterparty] = terms
        try:
            return past.offered(
                thread.deal,
                thread.counterparty,
                proposal_of(terms),
                valid_until_ms=thread.valid_until_ms,
                # Requests close between two ticks: what counts is when the offer came.
                now_ms=thread.history[-1].at_ms,
            )
        except (Refused, ConfigurationError):
            return past.dropped(thread.deal)

    def _told(self, decisions: list[RoundDecision], *, now_ms: int) -> list[Decision]:
        """Return a round's decisions as the desk takes them."""
        out: list[Decision] = []
        for decision in decisions:
            match decision:
                case AcceptOffer(thread, _, agree_by_ms):
                    out.append(Decision(thread, Verdict.ACCEPT, until_ms=agree_by_ms))
                case CounterOffer(thread, proposal):
                    unpaid = self._affordable(thread)
                    out.append(Decision(thread, Verdict.COUNTER, proposal=proposal, unpaid=unpaid))
                case RejectOffer(thread, reason):
                    unpaid = self._affordable(thread)
                    out.append(Decision(thread, Verdict.REJECT, reason=reason, unpaid=unpaid))
                case Mark(seller, outcome) if self._round is not None:
                    capability = self._round.capability
                    self._experience.mark(seller, capability, outcome, now_ms=now_ms)
                case Wait(until_ms):
                    self._wake_ms = until_ms
        return out

    def _affordable(self, deal: str) -> bool:
        """Return whether an offer is within what the buyer would pay, if its purse allows."""
        entry = self._round.entries.get(deal) if self._round is not None else None
        return entry is not None and entry.last_offer.proposal.price_units <= self._max_units


class Rooms(Protocol):
    """Whatever limits what may be spent."""

    @property
    def limited(self) -> bool:
        """Whether there is any limit at all."""

    def rooms(self, counterparty: AgentId, *, now_ms: int) -> dict[str, int]:
        """Return what each limit that concerns a deal with ``counterparty`` has left."""


class _Left:
    """What a purse has left for the price of a deal, once its bond is set aside as well."""

    def __init__(self, purse: Rooms) -> None:
        self._purse = purse
        self.now_ms = 0
        self.terms: dict[AgentId, Terms] = {}

    @property
    def limited(self) -> bool:
        return self._purse.limited

    def most_units(self, thread: Thread) -> int:
        """Return the highest price that all limits cover in ``thread``."""
        self.terms[thread.counterparty] = thread.agreed_terms
        return min(self.left_units(thread.counterparty).values(), default=0)

    def left_units(self, counterparty: AgentId) -> Mapping[str, int]:
        """Return the highest price that each limit covers together with its bond."""
        rooms = self._purse.rooms(counterparty, now_ms=self.now_ms)
        terms = self.terms.get(counterparty)
        if terms is None or not exposure(terms):
            return rooms
        price, whole = terms.price_units, exposure(terms)
        # Down, and a counter-offer scales its bond down too: together they stay within.
        return {name: max(left, 0) * price // whole for name, left in rooms.items()}
