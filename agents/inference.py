"""Inference and embeddings for sale: an agent that sells what an engine makes, and both wares.

::

    seller = inference_agent("oracle", price=Price.per_million(input="2", output="8"))
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import math
import re
import struct
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, get_args

from coase.protocol.errors import ComputeFailed, ConfigurationError, DealFailed

from .agent import Agent
from .bargain import SellerBargain
from .compute.gate import BYTES_PER_TOKEN, LOAD_GUESS_BYTES_PER_MS
from .compute.ports import (
    DIMENSIONS_MAX,
    SAMPLING_PERMILLE,
    TOOL_NAME_MAX_CHARS,
    Capability,
    Image,
    Message,
    ModelInfo,
    Prompt,
    PromptRefused,
    Tool,
    ToolCall,
    read_json,
)
from .job import Job  # noqa: TC001 - the handler's annotations are read.
from .transcript import clean
from .wares import Called, Completion, Embedding, Function, Inference, Turn, Vectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coase.negotiation.pricing import Price, Tariff
    from coase.protocol.messages import Request

    from .bargain import Style
    from .compute.ports import Completion as Written
    from .compute.ports import Compute, Thinking, Usage
    from .seller import Quote, Windows

SEED_SPACE: Final = 2**31
# Reading a token takes about a fifth of the time that writing one takes, on small machines.
READ_SHARE: Final = 5
PROBE: Final = Prompt.ask("Count from one to ten in words.", max_tokens=24)
PERMILLE: Final = 1_000
NS_PER_MS: Final = 1_000_000
# Models cut a picture into so many patches at most; what it takes is seldom half of it.
IMAGE_TOKENS_MAX: Final = 4_096
_THINKING: Final[dict[str, Thinking]] = {
    "": None,
    "off": False,
    "on": True,
    "low": "low",
    "medium": "medium",
    "high": "high",
}
_SAMPLING: Final = ("top_k", *SAMPLING_PERMILLE)
# What bidders are told of a prompt, so that none bids whose model cannot do it.
_NEEDS: Final[dict[str, Capability]] = {
    "tools": "tools",
    "images": "vision",
    "thinks": "thinking",
}
TRAIT_MAX_CHARS: Final = 32
REGION: Final = re.compile(rf"[a-z0-9][a-z0-9-]{{0,{TRAIT_MAX_CHARS - 1}}}")
LONGEST: Final = "longest"
"""In the features of texts to embed: how many bytes the longest of them has."""


@dataclass(slots=True)
class Stock:
    """What an engine has and how fast it is, as far as was seen; what its seller promises by."""

    models: list[ModelInfo] = field(default_factory=list)
    token_us: int = 0
    """For each token written by the first model, with its share of the reading; 0 if nothing was
    measured."""
    concurrency: int = 4
    paces: dict[str, int] = field(default_factory=dict)
    """The same for each model that was seen to write."""
    loading_ms: dict[str, int] = field(default_factory=dict)
    """How long a model took until it was ready, where that was seen."""
    region: str = ""
    """Where its seller says that it runs."""
    away: str = ""
    """Why the engine cannot be asked now; nothing is offered then."""

    @property
    def names(self) -> tuple[str, ...]:
        """The models that can be asked for, the default first."""
        return tuple(info.name for info in self.models if "completion" in info.capabilities)

    @property
    def embedders(self) -> tuple[str, ...]:
        """The models that make embeddings, the default first."""
        return tuple(info.name for info in self.models if "embedding" in info.capabilities)

    def named(self, model: str) -> ModelInfo | None:
        """Return what is known of a model; None if it is not here."""
        return next((info for info in self.models if info.name == model), None)

    def can(self, needs: Sequence[Capability], model: str) -> bool:
        """Return whether a model is able to do all of this; True where it is not known."""
        info = self.named(model)
        return info is None or all(need in info.capabilities for need in needs)

    @property
    def speed(self) -> str:
        """How fast it writes, for people."""
        if not self.token_us:
            return "too fast to measure"
        return f"{1_000_000 // self.token_us} tokens/s"

    async def read(self, compute: Compute) -> None:
        """Ask the engine what it has, and let it write a few words to see how fast it is.

        :raises ComputeFailed: if it cannot be asked, or has no model
        """
        self.models = await compute.models()
        if self.models and not self.names:
            return  # It only embeds, and nothing that it writes can be timed.
        begun_ns = time.monotonic_ns()
        async with aclosing(compute.stream(PROBE)) as chunks:
            async for chunk in chunks:
                if chunk.usage is not None:
                    elapsed_ms = (time.monotonic_ns() - begun_ns) // NS_PER_MS
                    self.learn(chunk.usage, elapsed_ms=elapsed_ms)

    async def refresh(self, compute: Compute) -> bool:
        """Ask again what the engine has and has loaded; return whether other models are there."""
        try:
            models = await compute.models()
        except ComputeFailed as error:
            self.away = str(error)
            return False
        before, self.models, self.away = [info.name for info in self.models], models, ""
        return before != [info.name for info in models]

    def learn(self, usage: Usage, *, model: str = "", elapsed_ms: int = 0) -> None:
        """Take a finished answer of a model, else of the first one, into the average.

        ``elapsed_ms`` is what it took in all: where the model was not loaded, the rest was that.
        """
        read = max(usage.input_tokens - usage.cached_input_tokens, 0)
        now_us = usage.duration_ms * 1_000 // max(usage.output_tokens + read // READ_SHARE, 1)
        first = self.names[0] if self.names else ""
        model = model or first
        if self.loads_ms(model):
            # What waited in a queue as well took longer than the loading alone.
            rest_ms = max(elapsed_ms - usage.duration_ms, 0)
            self.loading_ms[model] = min(rest_ms, self.loading_ms.get(model, rest_ms))
            self.models = [
                replace(info, loaded=True) if info.name == model else info for info in self.models
            ]
        before = self.paces.get(model, self.token_us if model == first else 0)
        self.paces[model] = (3 * before + now_us) // 4 if before else now_us
        if model == first:
            self.token_us = self.paces[model]

    def pace_us(self, model: str = "") -> int:
        """Return how long a model takes for a token.

        One that was not seen to write takes as much longer than the first as it is larger.
        """
        pace = self.paces.get(model)
        if pace is not None or not model:
            return pace if pace is not None else self.token_us
        sizes = {info.name: info.size_bytes for info in self.models}
        own, first = sizes.get(model, 0), sizes.get(self.names[0], 0) if self.names else 0
        return self.token_us * own // first if own and first else self.token_us

    def loads_ms(self, model: str = "") -> int:
        """Return how long it takes until a model is loaded; 0 if it is, or nobody says."""
        info = self._find(model)
        if info is None or info.loaded is not False:
            return 0
        return self.loading_ms.get(info.name, info.size_bytes // LOAD_GUESS_BYTES_PER_MS)

    def holds(self, input_tokens: int, model: str = "") -> bool:
        """Return whether a model's context takes so many tokens, as far as that is known."""
        info = self._find(model)
        return info is None or not info.context_tokens or input_tokens < info.context_tokens

    def expected_ms(
        self, *, input_tokens: int, output_tokens: int, load: int, model: str = ""
    ) -> int:
        """Return how long such an answer takes, behind or beside ``load`` others."""
        turns = load // self.concurrency + 1
        own_us = (output_tokens + input_tokens // READ_SHARE) * self.pace_us(model)
        return turns * own_us // 1_000 + self.loads_ms(model)

    def _find(self, model: str) -> ModelInfo | None:
        return self.named(model) if model else next(iter(self.models), None)


def _needed(request: Request) -> tuple[Capability, ...]:
    return tuple(need for name, need in _NEEDS.items() if request.features.get(name))


class InferenceBargain(SellerBargain):
    """Quotes for models that are here and answers that can be there in time, and for no others.

    It promises the time that the buyer gives, since that is what a seller that died costs.
    """

    def __init__(self, stock: Stock, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._stock = stock

    def quote(self, request: Request, buyer: str, *, load: int, now_ms: int) -> Quote | None:
        """Return the list price with the mark-up for load, or None if it cannot be done so."""
        embeds = request.capability.startswith("embedding-")
        names = self._stock.embedders if embeds else self._stock.names
        if self._stock.away or (self._stock.models and not names):
            return None
        if request.model and names and request.model not in names:
            return None
        model = request.model or (names[0] if names else "")
        if not self._stock.can(_needed(request), model):
            return None
        # The most that it may be, which is about twice of what it is.
        input_tokens = request.input_max // 2
        expected_ms = self._stock.expected_ms(
            input_tokens=input_tokens, output_tokens=request.output_max, load=load, model=model
        )
        if expected_ms > request.deliver_within_s * 1_000:
            return None
        # Of texts that are embedded each has the context for itself.
        longest = request.features.get(LONGEST, input_tokens * BYTES_PER_TOKEN)
        if not self._stock.holds(min(input_tokens, longest // BYTES_PER_TOKEN), model):
            return None
        quote = super().quote(request, buyer, load=load, now_ms=now_ms)
        return None if quote is None else replace(quote, model=model)

    def traits(self, model: str) -> str:
        """Return what a model is and can, for those who ask what is sold."""
        info = self._stock.named(model)
        return traits_of(info, region=self._stock.region) if info is not None else ""

    def _asked(self, request: Request, load: int) -> Tariff:
        return self._price.asked(
            self._asset,
            load_permille=PERMILLE * load // self._stock.concurrency,
            waiting=load - self._stock.concurrency,
            cold=self._stock.loads_ms(request.model) > 0,
        )

    def _within_s(self, request: Request) -> int:
        return request.deliver_within_s


def inference_agent(
    name: str,
    *,
    price: Price,
    compute: Compute | None = None,
    stock: Stock | None = None,
    strategy: Style = "linear",
    deliver_within: int = 60,
    capacity: int = 4,
    windows: Windows | None = None,
    about: str = "",
    by_rounds: bool = False,
) -> Agent:
    """Return an agent that sells what its engine writes, and shows it while it is written.

    With ``stock`` it offers the models in it, and refuses what the engine cannot deliver in time;
    without, it lets the engine refuse. It sells embeddings too if the stock has a model for them,
    at the price of what is read. With ``by_rounds`` it shows nothing, so that the same
    chances lead to the same deals.

    :raises ConfigurationError: if name, price, strategy or times cannot work
    """
    agent = Agent(name, compute=compute, by_rounds=by_rounds)

    @agent.offers(
        "inference",
        price=price,
        deliver_within=deliver_within,
        strategy=strategy,
        capacity=capacity,
        windows=windows,
        about=about or "a language model, by the token",
        models=lambda: stock.names if stock is not None else (),
        shown=not by_rounds,
    )
    async def infer(task: Inference, job: Job) -> Completion:
        # How many parts are shown depends on the clock, and each draws an id by chance.
        begun_ns = time.monotonic_ns()
        written = await job.complete(_agreed_prompt(task, job), show=not by_rounds)
        names = stock.names if stock is not None else ()
        if stock is not None:
            elapsed_ms = (time.monotonic_ns() - begun_ns) // NS_PER_MS
            stock.learn(written.usage, model=task.model, elapsed_ms=elapsed_ms)
        model = task.model or (names[0] if names else job.agent.compute.name)
        return completion_of(written, model=model)

    if stock is not None and stock.embedders:

        @agent.offers(
            "embedding",
            price=price,
            deliver_within=deliver_within,
            strategy=strategy,
            capacity=capacity,
            windows=windows,
            about="embeddings of texts, by the token",
            models=lambda: stock.embedders,
        )
        async def embed(task: Embedding, job: Job) -> Vectors:
            made = await job.agent.compute.embed(task.texts, task.model or None)
            job.meter(input_tokens=made.usage.input_tokens, output_tokens=0)
            return Vectors(
                vectors=tuple(packed(vector) for vector in made.vectors),
                model=made.model,
                input_tokens=made.usage.input_tokens,
            )

    if stock is not None:
        agent.bargain_class = functools.partial(InferenceBargain, stock)
    return agent


def _agreed_prompt(task: Inference, job: Job) -> Prompt:
    """Return the prompt of a task that is no larger than what its terms pay for.

    :raises DealFailed: if it is, since the bill ends there; the deal is then declined
    :raises PromptRefused: as ``prompt_of``
    """
    work, read = job.thread.agreed_terms.work, input_tokens_min(task)
    small = read <= work.input_max and task.max_tokens <= work.output_max
    if work.pricing == "tokens" and not small:
        raise DealFailed(
            job.thread.state,
            f"the task has {read} tokens and may write {task.max_tokens}, where {work.input_max}"
            f" and {work.output_max} were agreed",
            deal_id=job.deal,
        )
    return prompt_of(task)


def completion_of(written: Written, *, model: str) -> Completion:
    """Return what an engine wrote as the ware that was sold."""
    return Completion(
        text=clean(written.text),
        model=model,
        input_tokens=written.usage.input_tokens,
        output_tokens=written.usage.output_tokens,
        cached_input_tokens=written.usage.cached_input_tokens,
        finish=written.done_reason or "stop",
        thinking=clean(written.thinking),
        tool_calls=tuple(_called(call) for call in written.tool_calls),
    )


def tool_calls_of(delivered: Completion) -> tuple[ToolCall, ...]:
    """Return the calls that a bought answer holds."""
    return tuple(_tool_call(call) for call in delivered.tool_calls)


def prompt_of(task: Inference) -> Prompt:
    """Return the prompt that a bought task is for an engine.

    :raises PromptRefused: if a picture or a schema in it cannot be read
    """
    options: dict[str, Any] = {
        "model": task.model or None,
        "max_tokens": task.max_tokens,
        "temperature": task.temperature_permille / PERMILLE,
        "seed": task.seed,
        "stop": task.stop,
        "response_schema": _schema(task.response_schema) if task.response_schema else None,
        "tools": tuple(
            Tool(
                name=tool.name,
                description=tool.description,
                parameters=_schema(tool.parameters),
            )
            for tool in task.tools
        ),
        "tool_choice": task.tool_choice,
        "thinking": _THINKING[task.thinking],
        **{name: getattr(task, name) for name in _SAMPLING},
    }
    if task.raw:
        return Prompt(text=task.prompt + task.begun, **options)
    messages = [Message("system", task.system)] if task.system else []
    messages += [_message(turn) for turn in task.history]
    if task.prompt or task.images:
        messages.append(Message("user", task.prompt, images=_images(task.images)))
    if task.begun:
        messages.append(Message("assistant", task.begun))
    return Prompt(messages=tuple(messages), **options)


def task_of(prompt: Prompt, *, seed: int, begun: str = "", max_tokens: int = 0) -> Inference:
    """Return the task that buys what ``prompt`` asks for, gone on with from ``begun``.

    :raises PromptRefused: if it asks for what the ware has no words for
    """
    if prompt.logprobs:
        raise PromptRefused("log-probabilities cannot be bought; ask an engine of your own")
    options: dict[str, Any] = {
        "model": prompt.model or "",
        "max_tokens": max_tokens or prompt.max_tokens,
        "temperature_permille": round(prompt.temperature * PERMILLE),
        "seed": seed % SEED_SPACE,
        "stop": prompt.stop,
        "tool_choice": prompt.tool_choice,
        "thinking": next(word for word, asked in _THINKING.items() if asked == prompt.thinking),
        **{name: getattr(prompt, name) for name in _SAMPLING},
    }
    if prompt.response_schema is not None:
        options["response_schema"] = json.dumps(prompt.response_schema)
    try:
        options["tools"] = tuple(
            Function(
                name=tool.name,
                description=tool.description,
                parameters=json.dumps(tool.parameters),
            )
            for tool in prompt.tools
        )
        if prompt.text:
            return Inference(prompt=prompt.text, raw=True, begun=begun, **options)
        return _conversation(list(prompt.messages), begun, options)
    except ValueError as error:
        # A validation error shows what was given, which is nobody else's business.
        first = error.errors(include_input=False)[0] if hasattr(error, "errors") else {}
        where = ".".join(str(part) for part in first.get("loc", ())) or "prompt"
        raise PromptRefused(f"this cannot be bought: {where}: {first.get('msg', error)}") from None


def _conversation(messages: list[Message], begun: str, options: dict[str, Any]) -> Inference:
    if messages[-1].role == "assistant" and not messages[-1].tool_calls:
        begun = messages.pop().content + begun
    if not messages or messages[-1].role not in ("user", "tool"):
        raise PromptRefused(
            "the last message, or that before a begun answer, must be a user's or a tool's"
        )
    system = ""
    if messages[0].role == "system" and not messages[0].images:
        system = messages.pop(0).content
    question = Message("user", "")
    if messages[-1].role == "user" and (messages[-1].content or messages[-1].images):
        question = messages.pop()
    return Inference(
        prompt=question.content,
        images=tuple(_encoded(image) for image in question.images),
        system=system,
        history=tuple(_turn(message) for message in messages),
        begun=begun,
        **options,
    )


def input_tokens_max(task: Inference) -> int:
    """Return how many tokens a task is at most, for a model that reads it."""
    pictures = len(task.images) + sum(len(turn.images) for turn in task.history)
    # No tokenizer makes more than a token of two bytes, and a template some more.
    size = len(_without_images(task).model_dump_json().encode())
    return size // 2 + 64 + pictures * IMAGE_TOKENS_MAX


def input_tokens_min(task: Inference) -> int:
    """Return how many tokens of ``utf8/4`` the texts of a task are, without its pictures."""
    texts = [task.prompt, task.system, task.begun, *(turn.content for turn in task.history)]
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    return size // BYTES_PER_TOKEN


def _without_images(task: Inference) -> Inference:
    turns = tuple(turn.model_copy(update={"images": ()}) for turn in task.history)
    return task.model_copy(update={"images": (), "history": turns})


def features_of(task: Inference) -> dict[str, int]:
    """Return what bidders may know of a prompt: its size, and what its model must be able to do."""
    return {"bytes": len(task.model_dump_json().encode()), **needs_of(task)}


def needs_of(task: Inference) -> dict[str, int]:
    """Return what a model must be able to do for a prompt, in the words of its features."""
    found = {
        "tools": len(task.tools) if task.tool_choice != "none" else 0,
        "images": len(task.images) + sum(len(turn.images) for turn in task.history),
        "thinks": int(task.thinking not in ("", "off")),
    }
    return {name: count for name, count in found.items() if count}


def region_checked(text: str) -> str:
    """Return the region that a seller names; nothing is none.

    :raises ConfigurationError: if it is no short word of small letters, digits and hyphens
    """
    if text and not REGION.fullmatch(text):
        raise ConfigurationError(
            f"{text!r} is no region: name it by up to {TRAIT_MAX_CHARS} small letters, digits and"
            " hyphens, such as eu-west"
        )
    return text


def region_of(traits: str) -> str:
    """Return where a seller says that a model runs; nothing if it does not."""
    told = (word.removeprefix("region:") for word in traits.split() if word.startswith("region:"))
    return next((text for text in told if REGION.fullmatch(text)), "")


def traits_of(info: ModelInfo, *, region: str = "") -> str:
    """Return what a model is and can, and where, as the words of a description."""
    told: dict[str, int | str] = {
        "context": info.context_tokens,
        "parameters": info.parameter_count,
        "family": info.family,
        "quantisation": info.quantisation,
        "region": region,
    }
    words = [f"{name}:{value}" for name, value in told.items() if value]
    return " ".join([*info.capabilities, *(word for word in words if " " not in word)])


def info_of(name: str, traits: str) -> ModelInfo:
    """Return the model that a seller describes so; what cannot be read is as if it were not said.

    Who says nothing of it sells what everybody sells.
    """
    words = traits.split()
    told = dict(word.split(":", 1) for word in words if ":" in word)
    able = tuple(what for what in get_args(Capability) if what in words)

    def number(key: str) -> int:
        text = told.get(key, "")
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else 0

    return ModelInfo(
        name=name,
        capabilities=able or ("completion",),
        context_tokens=number("context"),
        parameter_count=number("parameters"),
        family=told.get("family", "")[:TRAIT_MAX_CHARS],
        quantisation=told.get("quantisation", "")[:TRAIT_MAX_CHARS],
    )


def packed(vector: tuple[float, ...]) -> str:
    """Return a vector as it is sold: base64 of 32-bit floats, little-endian."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def unpacked(vectors: Vectors, *, texts: int) -> tuple[tuple[float, ...], ...]:
    """Return the vectors that were bought for so many texts.

    :raises ValueError: if there are more or fewer, or they are none
    """
    if len(vectors.vectors) != texts:
        raise ValueError(f"{len(vectors.vectors)} vectors for {texts} texts")
    found = [base64.b64decode(vector, validate=True) for vector in vectors.vectors]
    size = len(found[0])
    if (
        size % 4
        or not 0 < size // 4 <= DIMENSIONS_MAX
        or {len(vector) for vector in found} != {size}
    ):
        raise ValueError("its vectors are not all of one length, or of none")
    made = tuple(struct.unpack(f"<{size // 4}f", vector) for vector in found)
    if not all(math.isfinite(number) for vector in made for number in vector):
        raise ValueError("a vector has a place that is no number")
    return made


def tokens_at_most(texts: tuple[str, ...]) -> int:
    """Return how many tokens these texts are at most, for a model that embeds them."""
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    return size * 2 // BYTES_PER_TOKEN + 2 * len(texts)


def longest_of(order: Embedding) -> int:
    """Return how many bytes the longest text of an order has."""
    return max(len(text.encode("utf-8", "replace")) for text in order.texts)


def _schema(text: str) -> dict[str, Any]:
    try:
        found = read_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise PromptRefused("a schema of this task is no JSON object")
    return found


def _images(encoded: tuple[str, ...]) -> tuple[Image, ...]:
    try:
        return tuple(Image(base64.b64decode(text, validate=True)) for text in encoded)
    except (binascii.Error, ValueError):
        raise PromptRefused("a picture of this task is no base64") from None


def _encoded(image: Image) -> str:
    return base64.b64encode(image.data).decode()


def _message(turn: Turn) -> Message:
    return Message(
        turn.role,
        turn.content,
        images=_images(turn.images),
        thinking=turn.thinking,
        tool_calls=tuple(_tool_call(call) for call in turn.tool_calls),
        tool_call_id=turn.tool_call_id,
        tool_name=turn.tool_name,
    )


def _turn(message: Message) -> Turn:
    return Turn(
        role=message.role,
        content=message.content,
        images=tuple(_encoded(image) for image in message.images),
        thinking=message.thinking,
        tool_calls=tuple(_called(call) for call in message.tool_calls),
        tool_call_id=message.tool_call_id,
        tool_name=message.tool_name,
    )


def _tool_call(call: Called) -> ToolCall:
    return ToolCall(name=call.name, arguments=call.arguments, id=call.id)


def _called(call: ToolCall) -> Called:
    # What a model makes up is cut to size rather than lost with all that it wrote.
    return Called(name=call.name[:TOOL_NAME_MAX_CHARS], arguments=call.arguments, id=call.id[:128])
