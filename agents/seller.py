"""The selling half of a desk: what is offered, at what terms, and who gets the capacity."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from coase.negotiation.pricing import TOKENS_PER_PRICE
from coase.protocol.errors import ConfigurationError, LocalProtocolError, Refused
from coase.protocol.messages import (
    CLOCK_SKEW_MAX_MS,
    LOCK_BY_MAX_S,
    MODELS_MAX,
    SCHEMA_MAX_CHARS,
    STREAMED,
    Accept,
    Counter,
    Description,
    Header,
    RateCall,
    Request,
    canonical_json,
    capability_id,
    schemas_hash,
    terms_to_wire,
    thread_id,
)
from coase.protocol.session import Margins, Thread
from coase.protocol.states import Role, State
from coase.protocol.terms import Terms, Work
from coase.protocol.types import ZERO_ADDRESS

from .metering import TOKENIZER, call_units, count_input, is_counted
from .standing import CONTRACT_S
from .steps import Notice, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coase.protocol.envelope import Message

    from .desk import Desk
    from .firm import Firm

OFFER_VALID_MS: Final = 10_000
FIRST_TOKENS: Final = 64  # More than a first chunk has.
LOCK_WITHIN_S: Final = 30  # Capacity is held until then, so it is short.


@dataclass(frozen=True, slots=True)
class Quote:
    """What a seller would do a request for; prices are units of the asset.

    ``price_units`` is what is locked at most; metered work names its prices in ``metered``.
    """

    price_units: int
    deliver_within_s: int
    quality: int = 50
    model: str = ""
    verification: str = "schema"
    pricing: str = "fixed"
    metered: Mapping[str, int] = field(default_factory=dict)


class SellerStrategy(Protocol):
    """Decides what to ask for; the desk makes terms of it."""

    def quote(self, request: Request, buyer: str, *, load: int, now_ms: int) -> Quote | None:
        """Return the opening quote for ``request``, or None not to bid."""

    def answer(self, thread: Thread, *, now_ms: int) -> Quote | None:
        """Return the quote that answers the buyer's counter-offer, or None to walk away.

        A quote equal to the counter-offer says yes to it.
        """


@runtime_checkable
class Telling(Protocol):
    """A strategy that knows what its models are."""

    def traits(self, model: str) -> str:
        """Return what a model is and can, in the words of a description."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How long each side has to act on chain, and the bond of a dispute, in the seller's terms."""

    lock_s: int = LOCK_WITHIN_S
    # Longer than anybody needs to start a market again: they pass only where somebody is silent.
    dispute_s: int = 60
    answer_s: int = 60
    rule_s: int = 60
    bond_permille: int = 100


@dataclass(frozen=True)
class Ware:
    """One capability that an agent sells."""

    name: str
    input_schema: Mapping[str, object]
    output_schema: Mapping[str, object]
    strategy: SellerStrategy
    price_text: str = ""
    about: str = ""
    models: tuple[str, ...] = ()
    """Names that a request may ask for, the default first."""
    capacity: int = 8
    windows: Windows = Windows()
    channel: bool = True
    """Whether it may be paid by a channel, where there are any."""
    shown: bool = False
    """Whether its text is delivered while it is written; else it is whole or not there."""

    @cached_property
    def schemas(self) -> bytes:
        """The hash of both schemas."""
        return schemas_hash(self.input_schema, self.output_schema)

    @cached_property
    def capability(self) -> str:
        """The capability's id."""
        return capability_id(self.name, self.schemas)


class SellerDesk:
    """Answers requests with offers, counter-offers with strategy, and accepts with a signature."""

    def __init__(
        self, desk: Desk, *, agent: str, arbiters: tuple[str, ...] = (), inbox_key: str = ""
    ) -> None:
        self.desk, self.agent, self.arbiters = desk, agent, arbiters
        self.inbox_key = inbox_key
        self.wares: dict[str, Ware] = {}
        self.firm: Callable[[], Firm | None] = lambda: None
        """Our own firm, for whose agents we work without a price."""
        self._requests: dict[str, str] = {}

    def sell(self, ware: Ware) -> None:
        """Add a ware.

        :raises ConfigurationError: if its schemas are too large to be described to others
        """
        for schema in (ware.input_schema, ware.output_schema):
            if len(canonical_json(schema)) > SCHEMA_MAX_CHARS:
                raise ConfigurationError(
                    f"a schema of {ware.name!r} has more than {SCHEMA_MAX_CHARS} characters"
                )
        self.wares[ware.capability] = ware

    def load(self, capability: str) -> int:
        """Return how many deals of ``capability`` are bound and not yet delivered."""
        return len(self.desk.working.get(capability, ()))

    def requested(self, header: Header, request: Request, step: Step, *, now_ms: int) -> None:
        """Offer terms if the request fits what we sell, whom we trust and what we can carry."""
        ware = self.wares.get(request.capability)
        domain = self.desk.domain
        if (
            ware is None
            or request.schemas[2:] != ware.schemas.hex()
            or (request.chain_id, request.escrow) != (domain.chain_id, domain.contract)
            or request.asset != self.desk.asset.token
            or request.reply_by_ms <= now_ms
        ):
            return
        load = self.load(ware.capability)
        if load >= ware.capacity:
            step.effects.append(Notice("no_capacity", header.id))
            return
        quote = ware.strategy.quote(request, header.sender, load=load, now_ms=now_ms)
        if quote is None or quote.verification not in request.verifications:
            return
        method = self._method(header, request, ware, quote)
        if request.is_standing and not self.desk.standing.has_room(header.sender, method):
            return
        if not method or not self._can_stake(request, method, quote):
            return
        deal = thread_id(header.id, header.sender, self.desk.me)
        if deal in self.desk.threads:
            return
        secret = self.desk.chance.take(32)
        thread = Thread(
            deal=deal,
            side=Role.SELLER,
            holder=self.desk.me,
            counterparty=header.sender,
            request_id=header.id,
            request=request,
            domain=domain,
            secret=secret,
            their_key=request.key,
            opened_ms=now_ms,
        )
        nonce = int.from_bytes(self.desk.chance.take(8), "big")
        opened = Step()
        self.desk.open_thread(thread, opened, now_ms=now_ms)
        try:
            self._offer(thread, ware, quote, method, nonce, "", opened, now_ms=now_ms)
        except LocalProtocolError:
            # A quote that no terms can be made of: as if there had been no request.
            del self.desk.threads[deal]
            raise
        step.records += opened.records
        step.effects += opened.effects

    def _offer(
        self,
        thread: Thread,
        ware: Ware,
        quote: Quote,
        method: str,
        nonce: int,
        answers: str,
        step: Step,
        *,
        now_ms: int,
    ) -> None:
        terms = self._terms(thread, ware, quote, method, nonce, now_ms=now_ms)
        body: dict[str, object] = {
            "request": thread.request_id,
            "answers": answers,
            "terms": terms_to_wire(terms),
            "valid_until_ms": now_ms + OFFER_VALID_MS,
            "key": self.desk.codec.public_key(thread.secret),
            "firm": self._proof(thread.request_id, method),
        }
        re = answers or thread.request_id
        self.desk.say(thread.deal, "offer", body, step, now_ms=now_ms, re=re)

    def _proof(self, request_id: str, method: str) -> str:
        """Return what tells a buyer that we are of its firm, and nothing to anybody else."""
        firm = self.firm() if method == "none" else None
        return firm.proof("seller", request_id, self.desk.me) if firm is not None else ""

    def _trusts(self, header: Header, request: Request) -> bool:
        firm = self.firm()
        return firm is not None and firm.has(
            header.sender, request.firm, side="buyer", request_id=header.id
        )

    def _can_stake(self, request: Request, method: str, quote: Quote) -> bool:
        """Return whether we can put up what the buyer asks for, with all that is promised."""
        if not request.stake_permille:
            return True
        desk, wanted = self.desk, stake_units(quote.price_units, request)
        promised = sum(
            thread.agreed_terms.stake_units
            for thread in map(desk.threads.__getitem__, desk.bound())
            if thread.side is Role.SELLER and thread.state is State.AGREED
        )
        free = (desk.stake_free_units or 0) - promised
        arbitrated = any(arbiter in request.arbiters for arbiter in self.arbiters)
        return method == "escrow" and arbitrated and request.vault == desk.vault and wanted <= free

    def _method(self, header: Header, request: Request, ware: Ware, quote: Quote) -> str:
        """Return how we are paid: what the buyer likes best of what we take; nothing if neither."""
        at_once = quote.price_units
        if quote.pricing == "tokens" and ware.shown:
            read = max(quote.metered.get("input", 0), quote.metered.get("cached_input", 0))
            first = read * request.input_max + quote.metered.get("output", 0) * FIRST_TOKENS
            at_once = min(at_once, first // TOKENS_PER_PRICE)
        for method in request.settlements:
            if method == "none" and self._trusts(header, request):
                return method
            if method == "channel" and ware.channel:
                if self.desk.streams.covers(header.sender, at_once):
                    return method
            if method == "escrow" and not request.is_standing:
                return method
        return ""

    def _terms(
        self, thread: Thread, ware: Ware, quote: Quote, method: str, nonce: int, *, now_ms: int
    ) -> Terms:
        request, windows = thread.request, ware.windows
        streamed, counted = method in STREAMED, method == "channel" and quote.pricing == "tokens"
        found = next((a for a in self.arbiters if a in request.arbiters), ZERO_ADDRESS)
        arbiter = ZERO_ADDRESS if streamed else found
        arbitrated = arbiter != ZERO_ADDRESS
        lock_s = max(CONTRACT_S, windows.lock_s) if request.is_standing else windows.lock_s
        lock_by_s = now_ms // 1000 + lock_s
        price = quote.price_units if method != "none" else 0
        metered = quote.metered if method != "none" else {}
        return Terms(
            buyer=thread.counterparty,
            seller=self.desk.me,
            asset=request.asset,
            price_units=price,
            arbiter=arbiter,
            bond_units=price * windows.bond_permille // 1000 if arbitrated else 0,
            default_to_seller_units=0 if streamed else price // 2,
            lock_by_s=lock_by_s,
            # A shorter lock is the buyer's affair; the work's own time is what was promised.
            deliver_by_s=lock_by_s + quote.deliver_within_s,
            dispute_s=windows.dispute_s,
            answer_s=windows.answer_s if arbitrated else 0,
            rule_s=windows.rule_s if arbitrated else 0,
            vault=request.vault if request.stake_permille else ZERO_ADDRESS,
            stake_units=stake_units(price, request),
            nonce=nonce,
            work=Work(
                capability=ware.capability,
                schemas=ware.schemas,
                task=bytes.fromhex(request.task[2:]),
                pricing=quote.pricing if method != "none" else "fixed",
                input_price_units=metered.get("input", 0),
                cached_input_price_units=metered.get("cached_input", 0),
                output_price_units=metered.get("output", 0),
                second_price_units=metered.get("second", 0),
                input_max=request.input_max,
                output_max=request.output_max,
                quality=quote.quality,
                model=quote.model,
                verification=quote.verification,
                tokenizer=TOKENIZER if counted else "",
                settlement=method,
            ),
        )

    def unable(self, thread: Thread, *, now_ms: int) -> str:
        """Return the NACK reason if ``thread`` cannot be agreed now, else nothing."""
        if now_ms >= thread.valid_until_ms:
            return "expired"
        ware = self.wares.get(thread.request.capability)
        if thread.is_contract:
            has_room = self.desk.standing.has_room(thread.counterparty, thread.method)
            return "" if has_room else "capacity"
        if ware is None or self.load(ware.capability) >= ware.capacity:
            return "capacity"
        return ""

    def called(self, thread: Thread, call: RateCall, *, now_ms: int) -> None:
        """Return if we can do now what a call under a rate contract asks for.

        :raises Refused: if we cannot, or it pays too little for what it may take
        """
        terms, desk = thread.agreed_terms, self.desk
        latest_s = now_ms // 1000 + lock_within_s(desk.margins.chain_s)
        if not desk.head.time_s < terms.lock_by_s <= latest_s:
            raise Refused("wrong_terms", "lock_by_s is over, or so far ahead that it holds a place")
        if not desk.streams.holds(replace(thread, task=call)):
            raise Refused("funds", "the channel is not seen to hold the price")
        ware = self.wares.get(thread.request.capability)
        load = self.load(thread.request.capability)
        if ware is None or load >= ware.capacity:
            raise Refused("capacity", "no place is free")
        limits = {"input_max": call.input_max, "output_max": call.output_max}
        asked = thread.request.model_copy(update=limits)
        if ware.strategy.quote(asked, thread.counterparty, load=load, now_ms=now_ms) is None:
            raise Refused("capacity", "it cannot be done so now")
        contract = desk.threads[thread.contract].agreed_terms
        try:
            units = call_units(contract, **limits)
        except ConfigurationError as error:
            raise Refused("wrong_terms", str(error)[:200]) from error
        if terms.price_units < units:
            raise Refused("wrong_terms", f"price_units is below {units}, which it may cost")
        if is_counted(terms) and count_input(call) > call.input_max:
            raise Refused("wrong_terms", "the task is larger than its input_max")

    def heard(self, thread: Thread, message: Message, step: Step, *, now_ms: int) -> None:
        """Answer a counter-offer with an offer, and an accept with our signature."""
        body = message.body
        if isinstance(body, Accept):
            signature = self.desk.codec.sign(thread.job_id)
            agreed: dict[str, object] = {
                "terms_digest": "0x" + thread.job_id.hex(),
                "signature": "0x" + signature.hex(),
            }
            self.desk.say(thread.deal, "agreed", agreed, step, now_ms=now_ms, re=message.id)
        elif isinstance(body, Counter):
            ware = self.wares.get(thread.request.capability)
            quote = ware.strategy.answer(thread, now_ms=now_ms) if ware is not None else None
            if ware is None or quote is None:
                no: dict[str, object] = {"proposal": message.id, "reason": "too far apart"}
                self.desk.say(thread.deal, "reject", no, step, now_ms=now_ms, re=message.id)
                return
            nonce, method = thread.agreed_terms.nonce, thread.method
            self._offer(thread, ware, quote, method, nonce, message.id, step, now_ms=now_ms)

    def ticked(self, step: Step, *, now_ms: int) -> None:
        """Nothing: a seller's deadlines are its threads'."""

    def ended(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        """Nothing: capacity is counted from the threads that are open."""

    def next_ms(self) -> int | None:
        """Return None: a seller has no timers of its own."""
        return None

    def describe(self, name: str, question: str) -> list[Description]:
        """Return what is sold under ``name``; everything for an empty name."""
        firm = self.firm()

        def traits(ware: Ware) -> list[str]:
            if not isinstance(ware.strategy, Telling):
                return []
            return [ware.strategy.traits(model)[:200] for model in ware.models[:MODELS_MAX]]

        return [
            Description(
                agent=self.agent[:128],
                capability=ware.capability,
                input_schema=canonical_json(ware.input_schema),
                output_schema=canonical_json(ware.output_schema),
                price=ware.price_text[:200],
                about=ware.about[:200],
                models=[name[:128] for name in ware.models[:MODELS_MAX]],
                traits=traits(ware),
                key=self.inbox_key,
                firm=firm.proof("seller", question, self.desk.me) if firm is not None else "",
            )
            for ware in self.wares.values()
            if name in ("", ware.name, ware.capability)
        ]


def lock_within_s(chain_s: int) -> int:
    """Return how long a deal may take to begin where acts count ``chain_s`` after they are done.

    It is below what a counterparty refuses whose clock differs.
    """
    slower_s = max(chain_s - Margins().chain_s, 0)
    return min(LOCK_WITHIN_S + 3 * slower_s, LOCK_BY_MAX_S - 2 * CLOCK_SKEW_MAX_MS // 1_000)


def stake_units(price_units: int, request: Request) -> int:
    """Return what a seller puts at stake for a price, rounded up; nothing if nobody asks for it."""
    return -(-price_units * request.stake_permille // 1_000)
