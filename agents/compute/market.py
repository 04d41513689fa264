"""The market as an engine: each prompt is a purchase of ``inference``, shown while it is written.

::

    buyer = Agent("buyer", budget="5")
    async with joined(buyer):
        market = MarketCompute(buyer, max_price="0.01")
        answer = await market.complete(Prompt.ask("Why is the sky blue?"))

The agent's budget is the hard limit of everything; ``max_price`` is that of one prompt, whatever
number of sellers it takes.
"""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from coase.agents.buyer import TOO_DEAR
from coase.agents.inference import (
    LONGEST,
    SEED_SPACE,
    input_tokens_max,
    longest_of,
    task_of,
    tokens_at_most,
    tool_calls_of,
    unpacked,
)
from coase.agents.runtime import clock_ms
from coase.agents.transcript import Reading
from coase.agents.wares import Completion as Delivered
from coase.agents.wares import Embedding, Vectors
from coase.protocol.errors import BudgetExhausted, ComputeFailed, DealFailed
from coase.protocol.states import State
from coase.protocol.types import units_to_text

from .blame import NoOffer, refusal, summed
from .explain import Attempt
from .gate import Gate, Limits, guess_tokens
from .ports import (
    Chunk,
    Compute,
    Embeddings,
    Estimate,
    ModelInfo,
    Prompt,
    PromptRefused,
    Unsupported,
    Usage,
    check_texts,
    failed,
)
from .purchase import DEAL_MAX_S, Bought, PromptPurchase
from .rates import Rates
from .routing import RouteBook
from .scout import FREE, Scout
from .ways import Size

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from coase.agents.agent import Agent
    from coase.agents.purchasing import Purchase
    from coase.agents.wares import Inference
    from coase.protocol.session import Thread
    from coase.protocol.types import Asset

    from .ports import DoneReason

log = logging.getLogger(__name__)

SELLERS_MAX: Final = 4  # For one prompt, one after the other; then the market has no answer.
DELIVER_WITHIN_S: Final = 60
# The longest tokens of the usual vocabularies are runs of blanks. Whoever shows more than the
# answer can hold is not writing it.
TOKEN_MAX_CHARS: Final = 128
# Between two parts of an answer. A part leaves a seller every 16 tokens or 200 ms.
STALL_MAX_S: Final = 10
DECIDE_AFTER_MS: Final = 300  # A person waits for the first word.
REPLY_WITHIN_MS: Final = 5_000  # Then nobody sells it.
REFUSED: Final = "the result was refused"
"""How the reason begins why a deal failed whose result was not accepted."""
# A text that begins as the answer did, for so long, is the answer from its beginning.
SETTLEMENTS: Final = ("none", "channel", "escrow")
SEAM_MIN_CHARS: Final = 8
LIMITS: Final = Limits(
    concurrency=16,
    first_chunk_max_s=SELLERS_MAX * (DEAL_MAX_S + DELIVER_WITHIN_S),
    next_chunk_max_s=SELLERS_MAX * (DEAL_MAX_S + DELIVER_WITHIN_S),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """From whom one answer may be bought, and from whom it had best be."""

    asked: tuple[str, ...] = ()
    """Asked first, and alone; if none of them offers, everybody is who is allowed."""
    allowed: frozenset[str] | None = None
    """Nobody else ever gets the prompt; None allows everybody."""
    banned: frozenset[str] = frozenset()
    most_units: int | None = None
    """The highest price of it all, if it is less than the market's own."""
    begun: str = ""
    """How the answer begins already: it goes on from there."""
    firm: bool = False
    """Whether nobody but our own firm is asked, which costs nothing."""


ANYBODY: Final = Pick()


@dataclass(frozen=True, slots=True, kw_only=True)
class BoughtChunk(Chunk):
    """A piece of a bought answer, with the deals that it took so far, the present one last."""

    bought: tuple[Bought, ...] = ()


class MarketCompute(Compute):
    """Buys every answer, from another seller where the first one fails.

    A seller that stops in mid-answer, or delivers another text than it showed, is left behind,
    and the next one goes on from what the reader has. Nobody is paid for what it did not deliver;
    one that falls silent and delivers in time after all is, since that was agreed.
    """

    def __init__(
        self,
        agent: Agent,
        *,
        max_price: str,
        deliver_within_s: int = DELIVER_WITHIN_S,
        stall_max_s: float = STALL_MAX_S,
        decide_after_ms: int = DECIDE_AFTER_MS,
        reply_within_ms: int = REPLY_WITHIN_MS,
        limits: Limits | None = None,
        book: RouteBook | None = None,
        settlements: Sequence[str] = SETTLEMENTS,
    ) -> None:
        self.agent, self.max_price = agent, max_price
        self.settlements = tuple(settlements)
        """How a prompt may be paid, what is liked best first: within a firm not at all."""
        self.book = book if book is not None else RouteBook()
        self.rates = Rates(agent)
        self.scout = Scout(agent, self.book, most_units=lambda: self.most_units)
        self.deliver_within_s, self.stall_max_s = deliver_within_s, stall_max_s
        self.decide_after_ms, self.reply_within_ms = decide_after_ms, reply_within_ms
        limits = limits or LIMITS
        # Silence is timed here, deal by deal; the gate's own limits must not be in the way.
        silence_s = max(LIMITS.first_chunk_max_s, limits.first_chunk_max_s)
        limits = replace(limits, first_chunk_max_s=silence_s, next_chunk_max_s=silence_s)
        self._gate = Gate(self.name, limits)

    @property
    def name(self) -> str:
        """What it is and where."""
        if self.settlements == ("none",):
            return "the firm"
        return f"the market, for at most {self.max_price} a prompt"

    async def models(self) -> list[ModelInfo]:
        """Return what sellers say they have, by name; heard at most half a minute ago."""
        return await self.scout.models()

    async def estimate(self, prompt: Prompt) -> Estimate:
        """Return a guess from the prompt's size and the purchases so far; asks nobody."""
        prompt.check()
        tokens = guess_tokens(prompt)
        return self._gate.estimated(prompt, input_tokens=tokens, exact=False, loading_ms=0)

    def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as its seller shows it, in chunks that name seller and price.

        Closed before there is a deal, it buys nothing; closed later, the deal goes its way.

        :raises BudgetExhausted: if the budget, or the prompt's highest price, does not cover it
        :raises ComputeFailed: if nobody sells it, or nobody delivered
        """
        return self.call(prompt, ANYBODY).stream()

    def call(self, prompt: Prompt, pick: Pick) -> MarketCall:
        """Return a call that buys one answer from those that ``pick`` names, once it is streamed.

        It tells, while it is streamed and afterwards, from whom and for how much.
        """
        return MarketCall(self, prompt, pick)

    @property
    def asset(self) -> Asset:
        """What is paid in.

        :raises ComputeFailed: if the agent has no place in a node
        """
        if self.agent.node is None:
            raise failed("nothing can be bought", why="the agent has no place", todo="Add it")
        return self.agent.node.settlement.asset

    @property
    def firm(self) -> bool:
        """Whether our agent is of a firm, whose others work for nothing."""
        buying = self.agent.buying
        return FREE in self.settlements and buying is not None and buying.firm() is not None

    @property
    def most_units(self) -> int:
        """The highest price of one prompt."""
        return self.asset.money(self.max_price).units

    def gated(
        self, prompt: Prompt, open_stream: Callable[[], AsyncGenerator[Chunk, None]]
    ) -> AsyncGenerator[Chunk, None]:
        """Yield what ``open_stream`` yields, when it is its turn."""
        return self._gate.run(prompt, open_stream)

    async def embed(
        self,
        texts: Sequence[str],
        model: str | None = None,
        pick: Pick | None = None,
        attempts: list[Attempt] | None = None,
    ) -> Embeddings:
        """Buy a vector for each of ``texts``, from another seller where the first one fails.

        Only those whom ``pick`` allows see the texts. What came of each seller goes to
        ``attempts``.

        :raises BudgetExhausted: if the budget does not cover it
        """
        check_texts(texts)
        begun_ns = time.monotonic_ns()
        try:
            order = Embedding(texts=tuple(texts), model=model or "")
        except ValueError:
            raise PromptRefused("a text is too long to be embedded on the market") from None
        attempts = attempts if attempts is not None else []
        bought = await self._embedded(order, pick or ANYBODY, attempts)
        duration_ms = (time.monotonic_ns() - begun_ns) // 1_000_000
        made = bought.result
        usage = Usage(input_tokens=made.input_tokens, output_tokens=0, duration_ms=duration_ms)
        vectors = unpacked(made, texts=len(order.texts))
        return Embeddings(vectors=vectors, model=made.model, usage=usage)

    async def _embedded(
        self, order: Embedding, pick: Pick, attempts: list[Attempt]
    ) -> Purchase[Vectors]:
        blocked: set[str] = set(pick.banned)
        most = self.most_units if pick.most_units is None else min(self.most_units, pick.most_units)
        max_price = units_to_text(most, self.asset.decimals)
        while True:
            agreed: list[Thread] = []
            begun_ns = time.monotonic_ns()
            try:
                bought = await self.agent.purchase(
                    "embedding",
                    order,
                    returns=Vectors,
                    check=lambda made: _fault(made, len(order.texts)),
                    max_price=max_price,
                    deliver_within=self.deliver_within_s,
                    model=order.model,
                    input_max=tokens_at_most(order.texts),
                    features={
                        "texts": len(order.texts),
                        LONGEST: longest_of(order),
                    },
                    decide_after_ms=self.decide_after_ms,
                    reply_within_ms=self.reply_within_ms,
                    blocked=blocked,
                    allowed=pick.allowed or (),
                    settlements=(FREE,) if pick.firm else self.settlements,
                    on_agreed=agreed.append,
                )
                attempts.append(self._tried(agreed[-1], begun_ns, paid_units=bought.paid_units))
                return bought
            except DealFailed as error:
                if not agreed:
                    self.scout.check_length(order)
                came_back = error.state in (State.REFUNDED, State.LAPSED)
                paid_units = 0 if came_back else None
                attempts += [
                    self._tried(thread, begun_ns, why=str(error), paid_units=paid_units)
                    for thread in agreed
                ]
                blocked.update(thread.counterparty for thread in agreed)
                if not agreed or len(blocked - pick.banned) == SELLERS_MAX:
                    none = failed(
                        f"embeddings could not be bought for at most {self.max_price}",
                        why=error.why,
                        todo="Raise the highest price, ask for another model, or see who sells",
                    )
                    raise summed(none, attempts) from error

    def _tried(
        self, thread: Thread, begun_ns: int, *, why: str = "", paid_units: int | None
    ) -> Attempt:
        """Return what came of a deal for vectors."""
        return Attempt(
            seller=thread.counterparty,
            place=self.scout.place_of(thread.counterparty),
            model=thread.agreed_terms.work.model,
            outcome="failed" if why else "answered",
            why=why,
            deal=thread.deal,
            took_ms=(time.monotonic_ns() - begun_ns) // 1_000_000,
            price_units=thread.agreed_terms.price_units,
            paid_units=paid_units,
        )

    async def close(self) -> None:
        """Listen no more to offers, and agree on no rates; the agent belongs to the caller."""
        await self.rates.close()
        await self.scout.close()


class MarketCall:
    """One prompt, and the purchases that it takes."""

    def __init__(self, market: MarketCompute, prompt: Prompt, pick: Pick = ANYBODY) -> None:
        self._market, self._prompt, self._pick = market, prompt, pick
        # One seed for all sellers: the same engine then gives the same text again.
        chance = secrets.randbelow(SEED_SPACE) if prompt.temperature else 0
        self._seed = prompt.seed if prompt.seed is not None else chance
        self._shown = pick.begun
        self._thought = ""
        self._bought: list[Bought] = []
        self._blocked: set[str] = set(pick.banned)
        self._asked = frozenset(pick.asked) - pick.banned
        self._settlements = (FREE,) if pick.firm else market.settlements
        self._begun_ns = time.monotonic_ns()
        self.attempts: list[Attempt] = []
        """What came of each seller so far."""
        self._unsure: list[tuple[str, str, int]] = []
        """Who said that it is the prompt, with which model and after how long."""

    @property
    def bought(self) -> tuple[Bought, ...]:
        """The deals that it took so far, the present one last."""
        return tuple(self._bought)

    def stream(self) -> AsyncGenerator[Chunk, None]:
        """Yield the answer, when it is its turn; raises what the market's ``stream`` raises."""
        return self._market.gated(self._prompt, self.run)

    def _readers(self) -> frozenset[str]:
        """Return who may offer now; nobody in particular where everybody may.

        :raises ComputeFailed: if nobody may
        """
        if self._asked:
            return self._asked
        allowed = self._pick.allowed
        if allowed is None:
            return frozenset()
        if left := allowed - self._blocked:
            return left
        raise failed("nobody is left to ask", why="none of those allowed delivered", todo="Wait")

    async def run(self) -> AsyncGenerator[Chunk, None]:
        """Yield the whole answer, whatever sellers it takes."""
        why: Exception | None = None
        tries = 0
        while tries < SELLERS_MAX:
            tokens_left = self._prompt.max_tokens - _tokens(self._shown)
            if self._shown and tokens_left < 1:
                yield self._last(None, "")
                return
            # What a schema binds cannot be gone on with: the grammar begins where the seller does.
            anew = self._prompt.response_schema is not None
            seam, reading = Seam(self._shown, anew=anew), Reading()
            since_ms = clock_ms()
            purchase, chosen = self._purchase(tokens_left, anew=anew), self._asked
            self._asked = frozenset()
            bad = False
            try:
                while (part := await purchase.next()) is not None:
                    shown = reading.take(part)
                    text, thinking = seam.take(shown.text), shown.thinking
                    self._note(purchase)
                    self._check_length(text + thinking)
                    if text or thinking:
                        self._shown += text
                        self._thought += thinking
                        bought = tuple(self._bought)
                        yield BoughtChunk(text=text, thinking=thinking, bought=bought)
                self._note(purchase)
                delivered = purchase.result()
                rest = seam.rest_of(delivered.text)
                if rest is not None:
                    self._learn(purchase, delivered=delivered)
                    yield self._last(delivered, rest)
                    return
                why = ComputeFailed(f"{purchase.seller} delivered another text than it showed")
                bad = True
            except _Unfit as error:
                why, bad = error, True
            except DealFailed as error:
                self._note(purchase, failure=error)
                if not purchase.seller and not chosen:
                    raise summed(self._nobody(error), self.attempts) from error
                if not purchase.seller:
                    self._market.scout.silent(chosen, since_ms=since_ms)
                why, bad = error, error.why.startswith(REFUSED)
            except TimeoutError:
                why = ComputeFailed(f"{purchase.seller or 'the market'} fell silent")
            finally:
                await purchase.leave()
                self._left_behind(purchase)
                self._learn(purchase, why=str(why or ""), bad=bad)
            if purchase.seller:
                tries += 1
                self._blocked.add(purchase.seller)
            log.warning("going on with another seller: %s", why)
        none = failed("no seller delivered", why=str(why), todo="Ask again later")
        raise summed(none, self.attempts) from why

    def _purchase(self, tokens_left: int, *, anew: bool) -> PromptPurchase:
        """Return the next purchase, begun."""
        order = task_of(
            self._prompt,
            seed=self._seed,
            begun="" if anew else self._shown,
            max_tokens=self._prompt.max_tokens if anew else tokens_left,
        )
        input_max = input_tokens_max(order)
        return PromptPurchase(
            self._market,
            order,
            self._left(),
            blocked=frozenset(self._blocked),
            allowed=self._readers(),
            chosen=bool(self._asked),
            settlements=self._settlements,
            input_max=input_max,
            contract=self._rates_for(order, input_max),
        )

    def _rates_for(self, order: Inference, input_max: int) -> Thread | None:
        """Return a rate contract with the seller who had best be asked, if there is one."""
        first = next((seller for seller in self._pick.asked if seller in self._asked), "")
        if not first:
            return None
        most = self._left() if self._settlements != (FREE,) else 0
        rates = self._market.rates
        contract = rates.find(first, order, input_max=input_max, most_units=most)
        if contract is None or contract.method not in self._settlements:
            return None
        return contract

    def _learn(
        self,
        purchase: PromptPurchase,
        *,
        delivered: Delivered | None = None,
        why: str = "",
        bad: bool = False,
    ) -> None:
        """Take into the book, once, what came of a purchase that came to a deal."""
        bought, book, now_ms = purchase.bought(), self._market.book, clock_ms()
        if bought is None or purchase.learnt:
            return
        purchase.learnt = True
        seller, model = bought.seller, bought.model
        took_us = purchase.elapsed_us()
        first_us = purchase.first_us
        outcome = "too late"
        book.left(seller, model, now_ms=now_ms)
        if delivered is not None:
            outcome = "answered"
            if self._pick.asked and purchase.deal is not None:
                self._market.rates.delivered(
                    purchase.deal,
                    purchase.order,
                    input_max=purchase.input_max,
                    within_s=purchase.within_s,
                )
            for other, named, lost_us in self._unsure:  # This one could, so that was no reason.
                book.failed(other, named, lost_us=lost_us, now_ms=now_ms)
            size = Size(delivered.input_tokens, delivered.output_tokens)
            book.delivered(
                seller, model, size, first_us=first_us or took_us, took_us=took_us, now_ms=now_ms
            )
            book.checked(seller, model, good=True, now_ms=now_ms)
        elif why:
            outcome = "failed"
            if refusal(why):
                self._unsure.append((seller, model, took_us))
            else:
                book.failed(seller, model, lost_us=took_us, now_ms=now_ms)
            if bad:
                book.checked(seller, model, good=False, now_ms=now_ms)
        elif not first_us:
            book.late(seller, model, took_us, now_ms=now_ms)
        kept = next((b for b in self._bought if b.deal == bought.deal), bought)
        self.attempts.append(
            Attempt(
                seller=seller,
                place=self._market.scout.place_of(seller),
                model=model,
                outcome=outcome,
                why=why,
                deal=bought.deal,
                first_ms=first_us // 1_000 if first_us else None,
                took_ms=took_us // 1_000,
                price_units=bought.price_units,
                paid_units=kept.paid_units if outcome != "answered" else bought.paid_units,
            )
        )

    def _left(self) -> int:
        """Return what this prompt may still cost.

        :raises BudgetExhausted: if that is nothing
        """
        most = self._market.most_units
        if self._pick.most_units is not None:
            most = min(most, self._pick.most_units)
        gone = sum(deal.cost_units for deal in self._bought)
        if most - gone < 1 and self._settlements != (FREE,):
            raise BudgetExhausted(limit="price of one prompt", asked_units=1, left_units=0)
        return most - gone

    def _check_length(self, text: str) -> None:
        length = len(self._shown) + len(self._thought) + len(text)
        if length > self._prompt.max_tokens * TOKEN_MAX_CHARS:
            raise _Unfit("it showed more than the answer can hold")

    def _note(self, purchase: PromptPurchase, *, failure: DealFailed | None = None) -> None:
        """Keep the deal that a purchase came to, and what is known of its price."""
        bought = purchase.bought()
        if bought is None:
            return
        if failure is not None and failure.state in (State.REFUNDED, State.LAPSED):
            bought = replace(bought, paid_units=0)
        self._bought = [b for b in self._bought if b.deal != bought.deal]
        self._bought.append(bought)

    def _left_behind(self, purchase: PromptPurchase) -> None:
        """Keep the deal of a purchase that is left, and what it cost if that is known by now."""
        bought = purchase.bought()
        if bought is None:
            return
        known = any(deal.deal == bought.deal for deal in self._bought)
        if not known:  # It showed nothing, and may cost something yet.
            self._bought.append(bought)
        elif bought.paid_units is not None:
            self._bought = [bought if d.deal == bought.deal else d for d in self._bought]

    def _last(self, delivered: Delivered | None, rest: str) -> Chunk:
        begun = len(self._pick.begun)
        before = len(self._bought) > 1 and len(self._shown) > begun
        tokens = delivered.output_tokens if delivered is not None else 0
        if before:  # What earlier sellers wrote; nobody delivered a count of it.
            own = len(delivered.text) if delivered is not None else 0
            earlier = max(len(self._shown) + len(rest) - own, 0)
            tokens += _tokens(self._shown[begun:earlier])
        duration_ms = (time.monotonic_ns() - self._begun_ns) // 1_000_000
        reason: DoneReason = "length"
        thinking = ""
        if delivered is None:
            given, cached = guess_tokens(self._prompt), 0
        else:
            given = delivered.input_tokens
            cached = min(delivered.cached_input_tokens, given)
            if delivered.finish != "length":
                reason = "tool_calls" if delivered.tool_calls else "stop"
            if not self._thought or delivered.thinking.startswith(self._thought):
                thinking = delivered.thinking[len(self._thought) :]
        return BoughtChunk(
            text=rest,
            thinking=thinking,
            tool_calls=tool_calls_of(delivered) if delivered is not None else (),
            tokens=tokens,
            done=True,
            done_reason=reason,
            usage=Usage(
                input_tokens=given,
                output_tokens=tokens,
                cached_input_tokens=cached,
                duration_ms=duration_ms,
            ),
            bought=tuple(self._bought),
        )

    def _nobody(self, error: DealFailed) -> ComputeFailed:
        what = f"the model {self._prompt.model!r}" if self._prompt.model else "inference"
        if lacks := self._market.scout.lacks(self._prompt):
            words = {"vision": "that reads images", "tools": "that calls tools"}
            words |= {"thinking": "that thinks aloud", "completion": "that writes"}
            can = " and ".join(words[need] for need in lacks)
            return Unsupported(f"{what} is not sold in a form {can}. Ask another model")
        failure = NoOffer(
            f"{what} could not be bought for at most {self._market.max_price}:"
            f" {error.why.rstrip('.')}. Raise the highest price, ask for another model, or see who"
            " sells: coase status"
        )
        failure.dear = error.why == TOO_DEAR
        return failure


class _Unfit(Exception):
    """A seller shows what cannot be the answer, or not how it goes on."""


def _fault(made: Vectors, texts: int) -> str | None:
    """Return what is wrong with bought vectors."""
    try:
        unpacked(made, texts=texts)
    except ValueError as error:
        return str(error)
    return None


def _tokens(text: str) -> int:
    """Return about how many tokens a text is, of which nobody delivered a count."""
    return guess_tokens(Prompt(text=text)) if text else 0


class Seam:
    """Joins what a seller writes to what the reader has already.

    A seller that was asked to go on may begin again instead. What repeats the text from its
    beginning is passed over; whatever else comes is how it goes on. One that was asked to begin
    ``anew`` must come by the same text.
    """

    def __init__(self, before: str, *, anew: bool = False) -> None:
        self._before = before if anew or len(before) >= SEAM_MIN_CHARS else ""
        self._anew = anew
        self._held = ""
        self._given = ""
        self._open = bool(self._before)

    def take(self, part: str) -> str:
        """Return what of ``part`` is new to the reader.

        :raises _Unfit: if it does not go on with what the reader has
        """
        text = self._joined(part)
        self._given += text
        return text

    def rest_of(self, whole: str) -> str | None:
        """Return what of the seller's whole text is still missing; None if it showed another."""
        again = Seam(self._before, anew=self._anew)
        new = again.take(whole)
        return new[len(self._given) :] if new.startswith(self._given) else None

    def _joined(self, part: str) -> str:
        if not self._open:
            return part
        self._held += part
        if self._before.startswith(self._held):
            return ""  # It may be a repetition; one that ends here brings nothing new.
        self._open = False
        if self._anew and not self._held.startswith(self._before):
            raise _Unfit("it wrote another answer than what was shown of it before")
        return self._held.removeprefix(self._before)
