"""What the three APIs have in common: reading requests, failing clearly, running prompts."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import anyio
from starlette.requests import Request

from coase.agents.compute.market import BoughtChunk
from coase.agents.compute.ports import (
    IMAGES_SIZE_MAX_BYTES,
    OUTPUT_TOKENS_MAX,
    SEED_MAX,
    TEMPERATURE_MAX,
    TOP_LOGPROBS_MAX,
    Capability,
    Chunk,
    ComputeBusy,
    Embeddings,
    Logprob,
    Prompt,
    PromptRefused,
    PromptTooLong,
    ToolCall,
    Usage,
    read_json,
)
from coase.agents.compute.router import Listed, ModelUnknown, RouterCompute
from coase.agents.compute.routing import Wish
from coase.agents.compute.ways import Place
from coase.protocol.errors import BudgetExhausted, CoaseError, JournalFailed

from .calls import Told, call_of, made_by
from .places import PLACE, Held, NoPlace
from .sending import WATCH
from .wishes import BadWish, wish_of

# A prompt of the largest size, with every character escaped, and all of its images as base64.
BODY_SIZE_MAX_BYTES: Final = 4 * 1024 * 1024 + IMAGES_SIZE_MAX_BYTES * 4 // 3
# Of all bodies that are being read at once: as many as come, they fill no memory.
BODIES_SIZE_MAX_BYTES: Final = 8 * BODY_SIZE_MAX_BYTES
BODY_MAX_S: Final = 30  # Whoever sends more slowly holds a place that others need.
NO_ROOM: Final = (
    "the disk of the gateway is full, or refuses to be written to, and what is not written down is"
    " not done; its log says where. It goes on when there is room"
)
BODY_QUICK_S: Final = 2  # For so long a body is not called slow.
# Other servers write until the model ends. Here it is what a price is set aside for.
ANSWER_TOKENS_DEFAULT: Final = 1_024
T = TypeVar("T")


class Wrong(Exception):
    """A request that is not served: an HTTP status, what is wrong, and which field."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, too_long: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.too_long = too_long
        """Whether the prompt does not fit the model, for which APIs have a word of their own."""


def wrong(error: CoaseError) -> Wrong:
    """Return what a client is told when a prompt failed."""
    match error:
        case ModelUnknown():
            return Wrong(404, str(error), param="model")
        case PromptTooLong():
            return Wrong(400, str(error), too_long=True)
        case PromptRefused():
            return Wrong(400, str(error))
        case BudgetExhausted():
            told = isinstance(error, Told)
            return Wrong(402, f"{'' if told else 'the budget of this gateway is used up: '}{error}")
        case ComputeBusy():
            return Wrong(429, str(error))
        case JournalFailed():
            return Wrong(507, NO_ROOM)
        case _:
            return Wrong(503, str(error))


async def body_of(request: Request) -> dict[str, Any]:
    """Return the JSON object that a request holds.

    :raises Wrong: if it is too large, too slow, or none
    """
    content, state = bytearray(), request.app.state
    place = request.scope.get(PLACE)

    try:
        async with _in_time(place):
            async for part in request.stream():
                content += part
                state.bodies_bytes = getattr(state, "bodies_bytes", 0) + len(part)
                if len(content) > BODY_SIZE_MAX_BYTES:
                    raise Wrong(413, f"the body is over {BODY_SIZE_MAX_BYTES >> 20} MiB")
                if state.bodies_bytes > BODIES_SIZE_MAX_BYTES:
                    raise Wrong(429, "too many large bodies are being read already")
    finally:
        if content:
            state.bodies_bytes -= len(content)
    try:
        body = read_json(bytes(content))
    except ValueError:
        raise Wrong(400, "the body is no JSON") from None
    if not isinstance(body, dict):
        raise Wrong(400, "the body is no JSON object")
    if (call := call_of(request)) is not None:
        call.read(body)
    request.state.body = body
    return body


@asynccontextmanager
async def _in_time(place: Held | None) -> AsyncIterator[None]:
    """End the block when it takes too long, or is one too many of those that take long.

    :raises Wrong: then
    """
    crowd: list[str] = []

    def late() -> None:
        try:
            if place is not None:
                slow.enter_context(place.slow())
        except NoPlace as error:
            crowd.append(f"{BODY_QUICK_S} s, and {error}")
            scope.cancel()

    timer = asyncio.get_running_loop().call_later(BODY_QUICK_S, late)
    with ExitStack() as slow, anyio.move_on_after(BODY_MAX_S) as scope:
        slow.callback(timer.cancel)
        yield
    if scope.cancelled_caught:
        raise Wrong(408, f"the body did not come within {crowd[0] if crowd else f'{BODY_MAX_S} s'}")


@dataclass(slots=True)
class Fields:
    """The fields of a body, read one by one; ``ignored`` are those that changed nothing."""

    body: Mapping[str, Any]
    ignored: list[str] = field(default_factory=list)

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text; without a default it must be there."""
        value = self.body.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise Wrong(400, f"{name} must be a text", param=name)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a truth value."""
        value = self.body.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise Wrong(400, f"{name} must be true or false", param=name)
        return value

    def number(self, name: str, default: float, *, most: float = TEMPERATURE_MAX) -> float:
        """Return a number from 0 to ``most``."""
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise Wrong(400, f"{name} must be a number from 0 to {most:g}", param=name)
        return float(value)

    def permille(self, name: str, *, least: int = 0, most: int = 1) -> int | None:
        """Return a number from ``least`` to ``most`` in thousandths; None if it is not given."""
        value = self.body.get(name)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not least <= value <= most
        ):
            raise Wrong(400, f"{name} must be a number from {least} to {most}", param=name)
        return round(value * 1_000)

    def whole(self, name: str, *, most: int, default: int = 0) -> int:
        """Return a whole number from 0 to ``most``."""
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise Wrong(400, f"{name} must be a whole number from 0 to {most}", param=name)
        return value

    def top_logprobs(self) -> int:
        """Return how many tokens are asked for at each place."""
        return self.whole("top_logprobs", most=TOP_LOGPROBS_MAX)

    def count(self, *names: str) -> int:
        """Return how many tokens an answer may have, by the first of ``names`` that is given."""
        for name in names:
            value = self.body.get(name)
            if value is None or value == -1:  # Ollama's word for "as many as it takes".
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise Wrong(400, f"{name} must be a whole number from 1", param=name)
            return min(value, OUTPUT_TOKENS_MAX)
        return ANSWER_TOKENS_DEFAULT

    def seed(self) -> int | None:
        """Return the seed; one that no engine takes is folded into those that it does."""
        value = self.body.get("seed")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise Wrong(400, "seed must be a whole number", param="seed")
        return value % (SEED_MAX + 1)

    def stops(self, name: str) -> tuple[str, ...]:
        """Return the texts that end an answer."""
        value = self.body.get(name)
        if value is None:
            return ()
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Wrong(400, f"{name} must be a text or a list of them", param=name)
        return tuple(text for text in texts if text)

    def refuse(self, why: str, *names: str, harmless: tuple[Any, ...] = ()) -> None:
        """Refuse the request if one of these fields asks for something."""
        for name in names:
            value = self.body.get(name)
            if value not in (None, False, "", [], {}, *harmless):
                raise Wrong(400, f"{name}: {why}", param=name)

    def hint(self, *names: str, neutral: tuple[Any, ...] = ()) -> None:
        """Note the fields that were given and change nothing here."""
        for name in names:
            if self.body.get(name) not in (None, *neutral):
                self.ignored.append(name)


def turns_of(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return the messages of a body, each with the words for its place.

    :raises Wrong: if it is no list of objects, or an empty one
    """
    if not isinstance(value, list) or not value:
        raise Wrong(400, "messages must be a list with one message at least", param="messages")
    for at, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise Wrong(400, f"messages[{at}] must be an object", param=f"messages[{at}]")
    return [(f"messages[{at}]", entry) for at, entry in enumerate(value)]


def role_in(entry: Mapping[str, Any], roles: Sequence[str], *, where: str) -> str:
    """Return the role of a message.

    :raises Wrong: if it is none of ``roles``
    """
    role = entry.get("role")
    if role not in roles:
        raise Wrong(400, f"{where}: the role must be one of {', '.join(roles)}", param=where)
    return str(role)


def blocks_of(content: Any, *, where: str) -> list[dict[str, Any]]:
    """Return the parts of a content, which may be a text.

    :raises Wrong: if it is neither a text nor a list of parts
    """
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Wrong(400, f"{where}: the content must be a text or a list of parts", param=where)
    return content


def text_in(part: Mapping[str, Any], *, where: str, name: str = "text") -> str:
    """Return the text of a part.

    :raises Wrong: if it has none
    """
    text = part.get(name)
    if not isinstance(text, str):
        raise Wrong(400, f"{where}: a part has no {name}", param=where)
    return text


def text_of(content: Any, *, where: str) -> str:
    """Return a content that may hold nothing but text.

    :raises Wrong: if it holds something else
    """
    texts: list[str] = []
    for part in blocks_of(content, where=where):
        if part.get("type") != "text":
            raise not_taken(part, where=where)
        texts.append(text_in(part, where=where))
    return "".join(texts)


def not_taken(part: Mapping[str, Any], *, where: str) -> Wrong:
    """Return what a client is told of a part that nothing here reads."""
    return Wrong(400, f"{where}: {str(part.get('type'))[:50]!r} parts are not taken", param=where)


@dataclass(slots=True)
class Answer:
    """An answer that has begun, and what is known of where it comes from."""

    first: Chunk
    rest: AsyncGenerator[Chunk, None]
    ignored: list[str]
    begun_ns: int
    _latest: Chunk | None = None

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Yield all chunks, the first one too."""
        async with aclosing(self.rest):
            self._latest = self.first
            yield self.first
            async for chunk in self.rest:
                self._latest = chunk
                yield chunk

    @property
    def usage(self) -> Usage:
        """What it took; nothing while it is not over."""
        latest = self._latest or self.first
        return latest.usage or Usage(input_tokens=0, output_tokens=0)

    @property
    def elapsed_ns(self) -> int:
        """How long it has taken, from the request on."""
        return time.monotonic_ns() - self.begun_ns

    def origin(self) -> dict[str, Any]:
        """Return where it was made, by whom, for how much and why, as far as that is known."""
        found = self._made()
        latest = self._latest or self.first
        if (explanation := latest.explanation or self.first.explanation) is not None:
            found |= {"call": explanation.call, "explanation": explanation.brief()}
        return found

    def _made(self) -> dict[str, Any]:
        latest = self._latest or self.first
        if not isinstance(latest, BoughtChunk) or not latest.bought:
            return {"made": "local"}
        deal = latest.bought[-1]
        found: dict[str, Any] = {
            "made": made_by(latest),
            "seller": deal.seller,
            "deal": deal.deal,
            "price": deal.price,
        }
        if deal.paid_units is not None:
            # With what was paid to those before it, who broke off.
            units = sum(each.paid_units or 0 for each in latest.bought)
            if latest.explanation is not None:  # Which knows of other ways that were gone, too.
                units = max(units, latest.explanation.paid_units)
            found["paid"] = replace(deal, paid_units=units).paid
        before = [earlier.seller for earlier in latest.bought[:-1]]
        if latest.explanation is not None:  # Which knows of other ways that were gone, too.
            tries = [each for each in latest.explanation.attempts if each.outcome != "too late"]
            before = [each.seller for each in tries if each.deal not in ("", deal.deal)]
        if before:
            found["sellers_before"] = before
        return found

    def headers(self) -> dict[str, str]:
        """Return the headers that say the same."""
        found = headers_of(self.origin())
        if self.ignored:
            found["x-coase-ignored"] = ", ".join(self.ignored)
        return found


@dataclass(frozen=True, slots=True)
class Whole:
    """An answer that is over."""

    text: str
    reason: str
    usage: Usage
    logprobs: tuple[Logprob, ...]
    thinking: str
    tool_calls: tuple[ToolCall, ...]


async def begin(
    request: Request, router: RouterCompute, prompt: Prompt, ignored: list[str]
) -> Answer:
    """Return the answer once its first chunk is there.

    :raises Wrong: if there is none
    """
    begun_ns = time.monotonic_ns()
    call, wish = call_of(request), _wish(request, router)

    def routed(wish: Wish | None = wish) -> AsyncGenerator[Chunk, None]:
        return router.stream(prompt, wish)

    def for_nothing() -> AsyncGenerator[Chunk, None]:
        asked = wish or Wish()
        return routed(replace(asked, reach=min(asked.reach, Place.FIRM)))

    in_firm = router.buys is not None and router.buys.firm
    free = for_nothing if in_firm else None
    stream = routed() if call is None else call.answer(routed, free)
    first = await unless_gone(request, lambda: anext(stream))
    return Answer(first, stream, ignored, begun_ns)


def _wish(request: Request, router: RouterCompute) -> Wish | None:
    """Return what a request wishes of the router.

    :raises Wrong: if that cannot be read
    """
    try:
        return wish_of(getattr(request.state, "body", {}), request.headers, router)
    except BadWish as error:
        raise Wrong(400, str(error), param=error.field) from None


async def whole(request: Request, answer: Answer) -> Whole:
    """Return all of an answer.

    :raises Wrong: if it breaks off
    """

    async def read() -> Whole:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[ToolCall] = []
        logprobs: list[Logprob] = []
        reason = "stop"
        async for chunk in answer.chunks():
            texts.append(chunk.text)
            thoughts.append(chunk.thinking)
            calls.extend(chunk.tool_calls)
            logprobs.extend(chunk.logprobs)
            reason = chunk.done_reason or reason
        return Whole(
            "".join(texts), reason, answer.usage, tuple(logprobs), "".join(thoughts), tuple(calls)
        )

    return await unless_gone(request, read)


async def embedded(request: Request, texts: Sequence[str], name: str) -> Embeddings:
    """Return the vectors of ``texts``; the name of the model may say that any will do.

    :raises Wrong: if there are none
    """
    router: RouterCompute = request.app.state.router
    call, wish = call_of(request), _wish(request, router)

    async def work() -> Embeddings:
        try:
            entry = await router.find(name)
        except ModelUnknown:
            if router.market is None:
                raise
            return await router.embed(texts, name, wish)  # Perhaps somebody sells that alone.
        return await router.embed(texts, None if entry is None else entry.info.name, wish)

    try:
        made = await unless_gone(request, work)
    except Wrong as error:
        cause = error.__cause__
        if call is not None and call.till is not None and isinstance(cause, BudgetExhausted):
            raise wrong(call.till.told(cause)) from cause
        raise
    if call is not None:
        call.used(made.usage)
        call.made, call.outcome = origin_of(made).get("made", ""), "done"
    return made


def origin_of(made: Embeddings) -> dict[str, Any]:
    """Return where vectors were made, by whom and for how much, as far as that is known."""
    told = made.explanation
    if told is None:
        return {}
    last = told.attempts[-1]
    found: dict[str, Any] = {"made": "local"}
    if last.deal:
        found = {
            "made": "bought" if last.price_units else "firm",
            "seller": last.seller,
            "deal": last.deal,
            "price": told.amount(last.price_units),
            "paid": told.amount(last.paid_units or 0),
        }
        if before := [each.seller for each in told.attempts[:-1] if each.deal]:
            found["sellers_before"] = before
    return found | {"call": told.call, "explanation": told.brief()}


def headers_of(origin: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers that say where an answer comes from."""
    return {
        f"x-coase-{name}": str(value)
        for name, value in origin.items()
        if name not in ("sellers_before", "explanation")
    }


async def listed(request: Request) -> list[Listed]:
    """Return all models that can be asked for.

    :raises Wrong: if that cannot be told
    """
    router: RouterCompute = request.app.state.router
    try:
        return await router.listed()
    except CoaseError as error:
        raise wrong(error) from error


async def able(request: Request, name: str, what: Capability) -> bool:
    """Return whether the model of that name can do ``what``; True where nobody knows."""
    router: RouterCompute = request.app.state.router
    try:
        entry = await router.find(name)
    except CoaseError:
        return True  # What is wrong with it is said when it is asked.
    return entry is None or what in entry.info.capabilities


async def unless_gone(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """Return what ``work`` gives; from now on all ends when the client goes.

    :raises Wrong: if it fails
    """
    request.scope[WATCH].begin()
    try:
        return await work()
    except CoaseError as error:
        raise wrong(error) from error


def new_id(prefix: str) -> str:
    """Return an id for an answer."""
    return prefix + secrets.token_hex(12)
