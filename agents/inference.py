"""Inference for sale: an agent that sells what an engine writes, and the ware in both directions.

::

    seller = inference_agent("oracle", price=Price.per_million(input="2", output="8"))
"""

from __future__ import annotations

import functools
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from .agent import Agent
from .bargain import SellerBargain
from .compute.ports import Message, Prompt, PromptRefused
from .job import Job  # noqa: TC001 - the handler's annotations are read.
from .wares import Completion, Inference, Turn

if TYPE_CHECKING:
    from coase.negotiation.pricing import Price
    from coase.protocol.messages import Request

    from .bargain import Style
    from .compute.ports import Compute, ModelInfo, Usage
    from .seller import Quote, Windows

SEED_SPACE: Final = 2**31
# Reading a token takes about a fifth of the time that writing one takes, on small machines.
READ_SHARE: Final = 5
PROBE: Final = Prompt.ask("Count from one to ten in words.", max_tokens=24)
PERMILLE: Final = 1_000


@dataclass(slots=True)
class Stock:
    """What an engine has and how fast it is, as far as was seen; what its seller promises by."""

    models: list[ModelInfo] = field(default_factory=list)
    token_us: int = 0
    """For each token written, with its share of the reading; 0 if nothing was measured."""
    concurrency: int = 4

    @property
    def names(self) -> tuple[str, ...]:
        """The models that can be asked for, the default first."""
        return tuple(info.name for info in self.models)

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
        async with aclosing(compute.stream(PROBE)) as chunks:
            async for chunk in chunks:
                if chunk.usage is not None:
                    self.learn(chunk.usage)

    def learn(self, usage: Usage) -> None:
        """Take a finished answer into the average."""
        read = max(usage.input_tokens - usage.cached_input_tokens, 0)
        now_us = usage.duration_ms * 1_000 // max(usage.output_tokens + read // READ_SHARE, 1)
        self.token_us = (3 * self.token_us + now_us) // 4 if self.token_us else now_us

    def expected_ms(self, *, input_tokens: int, output_tokens: int, load: int) -> int:
        """Return how long such an answer takes, behind or beside ``load`` others."""
        turns = load // self.concurrency + 1
        return turns * (output_tokens + input_tokens // READ_SHARE) * self.token_us // 1_000


class InferenceBargain(SellerBargain):
    """Quotes for models that are here and answers that can be there in time, and for no others.

    It promises the time that the buyer gives, since that is what a seller that died costs.
    """

    def __init__(self, stock: Stock, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._stock = stock

    def quote(self, request: Request, buyer: str, *, load: int, now_ms: int) -> Quote | None:
        """Return the list price with the mark-up for load, or None if it cannot be done so."""
        names = self._stock.names
        if request.model and names and request.model not in names:
            return None
        expected_ms = self._stock.expected_ms(
            # The most that it may be, which is about twice of what it is.
            input_tokens=request.input_max // 2,
            output_tokens=request.output_max,
            load=load,
        )
        if expected_ms > request.deliver_within_s * 1_000:
            return None
        quote = super().quote(request, buyer, load=load, now_ms=now_ms)
        model = request.model or (names[0] if names else "")
        return None if quote is None else replace(quote, model=model)

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
    without, it lets the engine refuse. With ``by_rounds`` it shows nothing, so that the same
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
    )
    async def infer(task: Inference, job: Job) -> Completion:
        # How many parts are shown depends on the clock, and each draws an id by chance.
        written = await job.complete(prompt_of(task), show=not by_rounds)
        names = stock.names if stock is not None else ()
        if stock is not None:
            stock.learn(written.usage)
        return Completion(
            text=written.text,
            model=task.model or (names[0] if names else job.agent.compute.name),
            input_tokens=written.usage.input_tokens,
            output_tokens=written.usage.output_tokens,
            finish=written.done_reason or "stop",
        )

    if stock is not None:
        agent.bargain_class = functools.partial(InferenceBargain, stock)
    return agent


def prompt_of(task: Inference) -> Prompt:
    """Return the prompt that a bought task is for an engine."""
    options: dict[str, Any] = {
        "model": task.model or None,
        "max_tokens": task.max_tokens,
        "temperature": task.temperature_permille / PERMILLE,
        "seed": task.seed,
        "stop": task.stop,
    }
    if task.raw:
        return Prompt(text=task.prompt + task.begun, **options)
    messages = [Message("system", task.system)] if task.system else []
    messages += [Message(turn.role, turn.content) for turn in task.history]
    messages.append(Message("user", task.prompt))
    if task.begun:
        messages.append(Message("assistant", task.begun))
    return Prompt(messages=tuple(messages), **options)


def task_of(prompt: Prompt, *, seed: int, begun: str = "", max_tokens: int = 0) -> Inference:
    """Return the task that buys what ``prompt`` asks for, gone on with from ``begun``.

    :raises PromptRefused: if it asks for what the ware has no words for
    """
    for asked, what in (
        (prompt.logprobs, "log-probabilities"),
        (prompt.response_schema is not None, "an answer that is bound to a schema"),
        (prompt.needs() != ("completion",), "an answer with tools, images or thinking"),
    ):
        if asked:
            raise PromptRefused(f"{what} cannot be bought; ask an engine of your own")
    options: dict[str, Any] = {
        "model": prompt.model or "",
        "max_tokens": max_tokens or prompt.max_tokens,
        "temperature_permille": round(prompt.temperature * PERMILLE),
        "seed": seed % SEED_SPACE,
        "stop": prompt.stop,
    }
    try:
        if prompt.text:
            return Inference(prompt=prompt.text, raw=True, begun=begun, **options)
        messages = list(prompt.messages)
        if messages[-1].role == "assistant":
            begun = messages.pop().content + begun
        if not messages or messages[-1].role != "user":
            raise PromptRefused("the last message, or that before a begun answer, must be a user's")
        system = messages.pop(0).content if messages[0].role == "system" else ""
        question = messages.pop()
        history = tuple(
            Turn.model_validate({"role": m.role, "content": m.content}) for m in messages
        )
        return Inference(
            prompt=question.content, system=system, history=history, begun=begun, **options
        )
    except ValueError as error:
        # A validation error shows what was given, which is nobody else's business.
        first = error.errors(include_input=False)[0] if hasattr(error, "errors") else {}
        where = ".".join(str(part) for part in first.get("loc", ())) or "prompt"
        raise PromptRefused(f"this cannot be bought: {where}: {first.get('msg', error)}") from None
