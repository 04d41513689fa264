"""From strategies to moves: what the negotiation package decides, in the words of the desk.

Sellers and buyers here hold the private side of a bargain. Only proposals leave: a reservation
value is given to ``Preferences`` and cannot be read back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, Literal

from coase.negotiation.issues import Preferences, Proposal
from coase.negotiation.policy import (
    AllowedSettlement,
    AllowedVerification,
    ArbiterList,
    DeadlineLimit,
    Forbidden,
    Policy,
    PriceLimit,
    QualityFloor,
    RoundsMax,
)
from coase.negotiation.pricing import Price, Tariff
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
from coase.protocol.errors import ConfigurationError
from coase.protocol.identity import keccak256
from coase.protocol.messages import Request
from coase.protocol.session import Thread
from coase.protocol.states import Role, State
from coase.protocol.terms import Terms
from coase.protocol.types import ZERO_ADDRESS, Asset

from .buyer import Decision, Verdict
from .seller import Quote

Style = Literal["fixed", "boulware", "linear", "conceder", "reciprocal"]
STYLES: Final[tuple[Style, ...]] = ("fixed", "boulware", "linear", "conceder", "reciprocal")
BARGAIN_MS: Final = 8_000  # A thread's whole bargain; offers are valid for ten seconds.
COUNTER_PATIENCE_MS: Final = 2_000
ROUNDS_OF_A_BUYER: Final = 3
SHORTLIST: Final = 3
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
    """One thread's bargain: our strategy in it, and what was proposed so far."""

    strategy: Strategy
    policy: Policy
    started_ms: int
    turns: list[Turn] = field(default_factory=list)

    def reply(
        self, role: Role, thread: Thread, *, rounds: int, by_rounds: bool, now_ms: int
    ) -> Move | Forbidden:
        """Return our move in answer to the proposal that lies in ``thread``."""
        theirs = Turn(
            Role.SELLER if role is Role.BUYER else Role.BUYER,
            proposal_of(thread.agreed_terms),
            now_ms,
            thread.valid_until_ms,
        )
        self.turns.append(theirs)
        made = sum(1 for turn in self.turns if turn.by is role)
        view = View(
            role=role,
            history=tuple(self.turns),
            started_ms=self.started_ms,
            deadline_ms=self.started_ms + BARGAIN_MS,
            # Counting rounds only makes the bargain repeatable whatever the machine's speed.
            now_ms=self.started_ms if by_rounds else now_ms,
            rounds_left=max(rounds - made, 0),
            counterparty=thread.counterparty,
            capability=thread.request.capability,
        )
        move = self.policy.check(self.strategy.reply(view), view)
        if isinstance(move, Counter):
            self.turns.append(Turn(role, move.proposal, now_ms))
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
        if request.deliver_within_s < self._deliver_within_s:
            return None
        if request.quality_min > self._quality:
            return None
        if request.model and self._model and request.model != self._model:
            return None
        load_permille = 1_000 * load // max(self._capacity, 1)
        tariff = self._price.asked(self._asset, load_permille=load_permille)
        cap = self._cap(tariff, request)
        if cap <= 0:
            return None
        verification = "schema" if "schema" in request.verifications else request.verifications[0]
        return Quote(
            price_units=cap,
            deliver_within_s=self._deliver_within_s,
            quality=self._quality,
            model=self._model,
            verification=verification,
            pricing=tariff.pricing,
            metered=_metered(tariff),
        )

    def _cap(self, tariff: Tariff, request: Request) -> int:
        return tariff.cap_units(
            input_max=request.input_max,
            output_max=request.output_max,
            seconds_max=self._deliver_within_s,
        )

    def answer(self, thread: Thread, *, now_ms: int) -> Quote | None:
        """Return the quote that answers the counter-offer in ``thread``, or None to walk away."""
        talk = self._talks.get(thread.deal) or self._open(thread, now_ms=now_ms)
        move = talk.reply(
            Role.SELLER, thread, rounds=self._rounds, by_rounds=self._by_rounds, now_ms=now_ms
        )
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
        preferences = Preferences(
            Role.SELLER,
            price_units=(max(cap, floor), floor),
            deliver_within_s=(self._deliver_within_s, self._deliver_within_s),
            quality=(self._quality, self._quality),
            verifications=(terms.work.verification,),
            arbiters=(terms.arbiter,),
            rates=tariff.rates if metered else None,
            cap_units=cap if metered else 0,
        )
        policy = Policy(
            [PriceLimit(Role.SELLER, floor), RoundsMax(), AllowedSettlement(("escrow",))]
        )
        talk = Talk(strategy_of(self._style, preferences), policy, now_ms)
        # The offer that opened the thread was our first turn.
        talk.turns.append(Turn(Role.SELLER, preferences.opening(), now_ms))
        if len(self._talks) > 10_000:  # Talks that nobody ended; their offers have lapsed.
            self._talks.clear()
        self._talks[thread.deal] = talk
        return talk


def _metered(tariff: Tariff) -> dict[str, int]:
    rates = tariff.rates
    return {
        "input": rates.input_price_units,
        "cached_input": rates.cached_input_price_units,
        "output": rates.output_price_units,
        "second": rates.second_price_units,
    }


class BuyerBargain:
    """Compares all offers of a round, bargains with the best few at once, and accepts one."""

    def __init__(
        self,
        *,
        max_price_units: int,
        hope_permille: int = 500,
        deliver_within_s: int,
        quality_min: int = 0,
        style: Style = "linear",
        arbiters: Collection[str] = (),
        verifications: tuple[str, ...] = ("schema", "none"),
        rounds: int = ROUNDS_OF_A_BUYER,
        shortlist: int = SHORTLIST,
        by_rounds: bool = False,
        salt: bytes = b"",
    ) -> None:
        self._max_units = max_price_units
        self._hope_permille = hope_permille
        self._deliver_within_s, self._quality_min = deliver_within_s, quality_min
        self._style, self._arbiters = style, tuple(arbiters)
        self._verifications = verifications
        self._rounds, self._shortlist_max, self._by_rounds = rounds, shortlist, by_rounds
        self._salt = salt
        self._talks: dict[str, Talk] = {}
        self._ready: dict[str, int] = {}
        self._countered_ms = 0

    def decide(
        self, offers: list[Thread], *, closing: bool, opened_ms: int, now_ms: int
    ) -> list[Decision]:
        """Return what to do about the offers that lie open."""
        if not closing and not self._talks:
            return []
        out: list[Decision] = []
        if not self._talks:
            out = self._shortlist(offers, now_ms=now_ms)
        out += self._bargain(offers, now_ms=now_ms)
        live = {thread.deal: thread for thread in offers}
        ready = [deal for deal in self._ready if deal in live]
        waiting = [
            deal
            for deal in self._talks
            if deal not in live or any(d.deal == deal and d.verdict != "reject" for d in out)
        ]
        patient = now_ms < self._countered_ms + COUNTER_PATIENCE_MS
        if ready and not (waiting and patient):
            best = min(ready, key=lambda deal: self._rank(live[deal]))
            out = [d for d in out if d.deal != best]
            out.append(Decision(best, Verdict.ACCEPT))
        return out

    def _rank(self, thread: Thread) -> tuple[int, bytes]:
        """Rank by price, then by a hash that no seller can choose to its favour for long."""
        tie = keccak256(self._salt + thread.counterparty.encode())
        return thread.agreed_terms.price_units, tie

    def _shortlist(self, offers: list[Thread], *, now_ms: int) -> list[Decision]:
        ranked = sorted(offers, key=self._rank)
        for thread in ranked[: self._shortlist_max]:
            self._talks[thread.deal] = self._open(thread, now_ms=now_ms)
        return [
            Decision(thread.deal, Verdict.REJECT, reason="others offered more for less")
            for thread in ranked[self._shortlist_max :]
        ]

    def _bargain(self, offers: list[Thread], *, now_ms: int) -> list[Decision]:
        out: list[Decision] = []
        for thread in sorted(offers, key=self._rank):
            talk = self._talks.get(thread.deal)
            if talk is None or thread.deal in self._ready or thread.state is not State.OFFERED:
                continue
            move = talk.reply(
                Role.BUYER, thread, rounds=self._rounds, by_rounds=self._by_rounds, now_ms=now_ms
            )
            if isinstance(move, Accept):
                self._ready[thread.deal] = thread.agreed_terms.price_units
            elif isinstance(move, Counter):
                self._countered_ms = now_ms
                proposal = move.proposal
                out.append(
                    Decision(
                        thread.deal,
                        Verdict.COUNTER,
                        price_units=proposal.price_units,
                        deliver_within_s=proposal.deliver_within_s,
                    )
                )
            else:
                self._talks.pop(thread.deal)
                out.append(Decision(thread.deal, Verdict.REJECT, reason="too far apart"))
        return out

    def _open(self, thread: Thread, *, now_ms: int) -> Talk:
        terms = thread.agreed_terms
        hope = max(terms.price_units * self._hope_permille // 1_000, 1)
        preferences = Preferences(
            Role.BUYER,
            price_units=(min(hope, self._max_units), self._max_units),
            deliver_within_s=(self._deliver_within_s, self._deliver_within_s),
            quality=(max(self._quality_min, terms.work.quality), self._quality_min),
            verifications=self._verifications,
            arbiters=(terms.arbiter,),
        )
        policy = Policy(
            [
                PriceLimit(Role.BUYER, self._max_units, clamp=False),
                DeadlineLimit(self._deliver_within_s),
                QualityFloor(self._quality_min),
                AllowedSettlement(("escrow",)),
                AllowedVerification(self._verifications),
                ArbiterList((*self._arbiters, ZERO_ADDRESS)),
                RoundsMax(),
            ]
        )
        return Talk(strategy_of(self._style, preferences), policy, now_ms)
