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

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from coase.agents.inference import (
    SEED_SPACE,
    input_tokens_max,
    task_of,
    tokens_at_most,
    tool_calls_of,
    unpacked,
)
from coase.agents.transcript import Reading
from coase.agents.wares import Completion as Delivered
from coase.agents.wares import Embedding, Vectors
from coase.protocol.errors import BudgetExhausted, ComputeFailed, DealFailed
from coase.protocol.states import State
from coase.protocol.types import units_to_text

from .gate import Gate, Limits, guess_tokens
from .ports import (
    Chunk,
    Compute,
    Embeddings,
    Estimate,
    ModelInfo,
    Prompt,
    PromptRefused,
    Usage,
    check_texts,
    failed,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from coase.agents.agent import Agent, Purchase
    from coase.agents.wares import Inference
    from coase.protocol.session import Thread
    from coase.protocol.types import Asset

    from .ports import DoneReason

log = logging.getLogger(__name__)

SELLERS_MAX: Final = 4  # For one prompt, one after the other; then the market has no answer.
DELIVER_WITHIN_S: Final = 60
# On top of that for each so many tokens: a large model on a processor writes no faster.
TOKENS_PER_S_MIN: Final = 8
# The longest tokens of the usual vocabularies are runs of blanks. Whoever shows more than the
# answer can hold is not writing it.
TOKEN_MAX_CHARS: Final = 128
# Between two parts of an answer. A part leaves a seller every 16 tokens or 200 ms.
STALL_MAX_S: Final = 10
# Asking, bargaining, agreeing and locking, before the time to deliver begins.
DEAL_MAX_S: Final = 30
DECIDE_AFTER_MS: Final = 300  # A person waits for the first word.
REPLY_WITHIN_MS: Final = 5_000  # Then nobody sells it.
MODELS_AGE_MAX_S: Final = 30
# A text that begins as the answer did, for so long, is the answer from its beginning.
SEAM_MIN_CHARS: Final = 8
LIMITS: Final = Limits(
    concurrency=16,
    first_chunk_max_s=SELLERS_MAX * (DEAL_MAX_S + DELIVER_WITHIN_S),
    next_chunk_max_s=SELLERS_MAX * (DEAL_MAX_S + DELIVER_WITHIN_S),
)


@dataclass(frozen=True, slots=True)
class Bought:
    """One deal that an answer took."""

    seller: str
    deal: str
    model: str
    price_units: int
    """What was locked at most."""
    paid_units: int | None
    """What it cost in the end; None while that is open."""
    symbol: str
    decimals: int

    @property
    def price(self) -> str:
        """The highest price, for people."""
        return f"{units_to_text(self.price_units, self.decimals)} {self.symbol}"

    @property
    def paid(self) -> str:
        """What was paid, for people; nothing while nothing was."""
        units = self.paid_units or 0
        return f"{units_to_text(units, self.decimals)} {self.symbol}"


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
    ) -> None:
        self.agent, self.max_price = agent, max_price
        self.deliver_within_s, self.stall_max_s = deliver_within_s, stall_max_s
        self.decide_after_ms, self.reply_within_ms = decide_after_ms, reply_within_ms
        limits = limits or LIMITS
        # Silence is timed here, deal by deal; the gate's own limits must not be in the way.
        silence_s = max(LIMITS.first_chunk_max_s, limits.first_chunk_max_s)
        limits = replace(limits, first_chunk_max_s=silence_s, next_chunk_max_s=silence_s)
        self._gate = Gate(self.name, limits)
        self._models: list[ModelInfo] = []
        self._models_s: float | None = None

    @property
    def name(self) -> str:
        """What it is and where."""
        return f"the market, for at most {self.max_price} a prompt"

    async def models(self) -> list[ModelInfo]:
        """Return what sellers say they have, by name; heard at most half a minute ago."""
        now_s = time.monotonic()
        if self._models_s is None or now_s - self._models_s > MODELS_AGE_MAX_S or not self._models:
            if self.agent.node is None:
                raise failed("nothing can be bought", why="the agent has no place", todo="Add it")
            found = await self.agent.node.discover(self.agent, "inference")
            names = {name for _, description in found for name in description.models}
            self._models = [ModelInfo(name=name) for name in sorted(names)]
            self._models_s = now_s
        return list(self._models)

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
        return self._gate.run(prompt, lambda: _Call(self, prompt).run())

    async def embed(self, texts: Sequence[str], model: str | None = None) -> Embeddings:
        """Buy a vector for each of ``texts``, from another seller where the first one fails.

        :raises BudgetExhausted: if the budget does not cover it
        """
        check_texts(texts)
        begun_ns = time.monotonic_ns()
        try:
            order = Embedding(texts=tuple(texts), model=model or "")
        except ValueError:
            raise PromptRefused("a text is too long to be embedded on the market") from None
        try:
            bought = await self.agent.purchase(
                "embedding",
                order,
                returns=Vectors,
                check=lambda made: _fault(made, len(order.texts)),
                max_price=self.max_price,
                deliver_within=self.deliver_within_s,
                model=order.model,
                input_max=tokens_at_most(order.texts),
                features={"texts": len(order.texts)},
                decide_after_ms=self.decide_after_ms,
                reply_within_ms=self.reply_within_ms,
                tries=SELLERS_MAX,
            )
        except DealFailed as error:
            raise failed(
                f"embeddings could not be bought for at most {self.max_price}",
                why=error.why,
                todo="Raise the highest price, ask for another model, or see who sells them",
            ) from error
        duration_ms = (time.monotonic_ns() - begun_ns) // 1_000_000
        made = bought.result
        usage = Usage(input_tokens=made.input_tokens, output_tokens=0, duration_ms=duration_ms)
        vectors = unpacked(made, texts=len(order.texts))
        return Embeddings(vectors=vectors, model=made.model, usage=usage)

    async def close(self) -> None:
        """Do nothing: the agent and its node belong to the caller."""


class _Call:
    """One prompt, and the purchases that it takes."""

    def __init__(self, market: MarketCompute, prompt: Prompt) -> None:
        self._market, self._prompt = market, prompt
        # One seed for all sellers: the same engine then gives the same text again.
        chance = secrets.randbelow(SEED_SPACE) if prompt.temperature else 0
        self._seed = prompt.seed if prompt.seed is not None else chance
        self._shown = ""
        self._thought = ""
        self._bought: list[Bought] = []
        self._blocked: set[str] = set()
        self._begun_ns = time.monotonic_ns()

    async def run(self) -> AsyncGenerator[Chunk, None]:
        """Yield the whole answer, whatever sellers it takes."""
        why: Exception | None = None
        for _ in range(SELLERS_MAX):
            tokens_left = self._prompt.max_tokens - _tokens(self._shown)
            if self._shown and tokens_left < 1:
                yield self._last(None, "")
                return
            # What a schema binds cannot be gone on with: the grammar begins where the seller does.
            anew = self._prompt.response_schema is not None
            order = task_of(
                self._prompt,
                seed=self._seed,
                begun="" if anew else self._shown,
                max_tokens=self._prompt.max_tokens if anew else tokens_left,
            )
            seam, reading = _Seam(self._shown, anew=anew), Reading()
            purchase = _Purchase(self._market, order, self._left(), frozenset(self._blocked))
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
                    yield self._last(delivered, rest)
                    return
                why = ComputeFailed(f"{purchase.seller} delivered another text than it showed")
            except _Unfit as error:
                why = error
            except DealFailed as error:
                self._note(purchase, failure=error)
                if not purchase.seller:
                    raise self._nobody(error) from error
                why = error
            except TimeoutError:
                why = ComputeFailed(f"{purchase.seller or 'the market'} fell silent")
            finally:
                await purchase.leave()
            self._blocked.add(purchase.seller)
            log.warning("going on with another seller: %s", why)
        raise failed("no seller delivered", why=str(why), todo="Ask again later") from why

    def _left(self) -> int:
        """Return what this prompt may still cost.

        :raises BudgetExhausted: if that is nothing
        """
        most = self._asset().money(self._market.max_price).units
        gone = sum(self._cost(deal) for deal in self._bought)
        if most - gone < 1:
            raise BudgetExhausted(limit="price of one prompt", asked_units=1, left_units=0)
        return most - gone

    def _cost(self, bought: Bought) -> int:
        """Return what a deal costs at most: its price, unless more is known."""
        return bought.price_units if bought.paid_units is None else bought.paid_units

    def _asset(self) -> Asset:
        node = self._market.agent.node
        assert node is not None
        return node.settlement.asset

    def _check_length(self, text: str) -> None:
        length = len(self._shown) + len(self._thought) + len(text)
        if length > self._prompt.max_tokens * TOKEN_MAX_CHARS:
            raise _Unfit("it showed more than the answer can hold")

    def _note(self, purchase: _Purchase, *, failure: DealFailed | None = None) -> None:
        """Keep the deal that a purchase came to, and what is known of its price."""
        bought = purchase.bought()
        if bought is None:
            return
        if failure is not None and failure.state in (State.REFUNDED, State.LAPSED):
            bought = replace(bought, paid_units=0)
        self._bought = [b for b in self._bought if b.deal != bought.deal]
        self._bought.append(bought)

    def _last(self, delivered: Delivered | None, rest: str) -> Chunk:
        before = len(self._bought) > 1 and bool(self._shown)
        tokens = delivered.output_tokens if delivered is not None else 0
        if before:  # What earlier sellers wrote; nobody delivered a count of it.
            own = len(delivered.text) if delivered is not None else 0
            earlier = max(len(self._shown) + len(rest) - own, 0)
            tokens += _tokens(self._shown[:earlier])
        duration_ms = (time.monotonic_ns() - self._begun_ns) // 1_000_000
        reason: DoneReason = "length"
        thinking = ""
        if delivered is not None:
            if delivered.finish != "length":
                reason = "tool_calls" if delivered.tool_calls else "stop"
            if not self._thought or delivered.thinking.startswith(self._thought):
                thinking = delivered.thinking[len(self._thought) :]
        given = delivered.input_tokens if delivered is not None else guess_tokens(self._prompt)
        return BoughtChunk(
            text=rest,
            thinking=thinking,
            tool_calls=tool_calls_of(delivered) if delivered is not None else (),
            tokens=tokens,
            done=True,
            done_reason=reason,
            usage=Usage(input_tokens=given, output_tokens=tokens, duration_ms=duration_ms),
            bought=tuple(self._bought),
        )

    def _nobody(self, error: DealFailed) -> ComputeFailed:
        what = f"the model {self._prompt.model!r}" if self._prompt.model else "inference"
        return failed(
            f"{what} could not be bought for at most {self._market.max_price}",
            why=error.why,
            todo="Raise the highest price, ask for another model, or see who sells: coase status",
        )


class _Unfit(Exception):
    """A seller shows what cannot be the answer, or not how it goes on."""


class _Purchase:
    """One purchase that runs beside its reader."""

    def __init__(
        self, market: MarketCompute, order: Inference, most_units: int, blocked: frozenset[str]
    ) -> None:
        self._market = market
        self._within_s = market.deliver_within_s + order.max_tokens // TOKENS_PER_S_MIN
        self._parts: asyncio.Queue[str | None] = asyncio.Queue()
        self._thread: Thread | None = None
        self._shown = False
        self._ended = False
        # Whoever reads owns it, and takes it away in ``leave``.
        self._task = asyncio.create_task(self._buy(order, most_units, blocked))

    @property
    def seller(self) -> str:
        """Who sells, once there is a deal; else nothing."""
        return self._thread.counterparty if self._thread is not None else ""

    async def next(self) -> str | None:
        """Return the next part that the seller shows, or None when the purchase is over.

        :raises TimeoutError: if the seller is silent for too long
        """
        silence_s: float = DEAL_MAX_S + self._within_s
        if self._shown:
            silence_s = self._market.stall_max_s
        async with asyncio.timeout(silence_s):
            part = await self._parts.get()
        self._shown = True
        return part

    def result(self) -> Delivered:
        """Return what was delivered; raises what the purchase raised."""
        return self._task.result().result

    def bought(self) -> Bought | None:
        """Return the deal as far as it is known."""
        if self._thread is None or self._market.agent.node is None:
            return None
        asset, terms = self._market.agent.node.settlement.asset, self._thread.agreed_terms
        paid: int | None = None
        if self._task.done() and not self._task.cancelled() and self._task.exception() is None:
            paid = self._task.result().paid_units
        return Bought(
            self._thread.counterparty,
            self._thread.deal,
            terms.work.model,
            terms.price_units,
            paid,
            asset.symbol,
            asset.decimals,
        )

    async def leave(self) -> None:
        """Wait for it no more. What was agreed goes its way without a reader."""
        self._task.cancel()
        await asyncio.wait((self._task,))
        if not self._task.cancelled():
            self._task.exception()  # Looked at, so that nobody complains that none did.

    async def _buy(
        self, order: Inference, most_units: int, blocked: frozenset[str]
    ) -> Purchase[Delivered]:
        agent, market = self._market.agent, self._market
        assert agent.node is not None
        size = len(order.model_dump_json().encode())
        try:
            return await agent.purchase(
                "inference",
                order,
                returns=Delivered,
                max_price=units_to_text(most_units, agent.node.settlement.asset.decimals),
                deliver_within=self._within_s,
                model=order.model,
                input_max=input_tokens_max(order),
                output_max=order.max_tokens,
                features={"bytes": size},
                decide_after_ms=market.decide_after_ms,
                reply_within_ms=market.reply_within_ms,
                blocked=blocked,
                on_text=self._parts.put_nowait,
                on_agreed=self._agreed,
            )
        finally:
            self._parts.put_nowait(None)

    def _agreed(self, thread: Thread) -> None:
        self._thread = thread


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


class _Seam:
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
        again = _Seam(self._before, anew=self._anew)
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
