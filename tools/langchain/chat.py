"""A chat model for LangChain: over a gateway, or over an engine or market of this very process.

::

    model = ChatCoase(model="qwen3:4b")                       # coase gateway, on this machine
    model = ChatCoase(compute=MarketCompute(buyer, max_price="0.01"))    # ainvoke, astream
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

import httpx
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, Field, SecretStr

from coase.agents.compute.market import BoughtChunk
from coase.agents.compute.ports import Chunk, Compute, Message, Prompt, Role
from coase.protocol.errors import ComputeFailed, ConfigurationError

GATEWAY: Final = "http://127.0.0.1:11435"
# An answer may be bargained for and made by more than one seller.
TIMEOUT_S: Final = 300
ERROR_SHOWN_MAX_CHARS: Final = 300


class ChatCoase(BaseChatModel):
    """Answers made on this machine or bought, by whatever ``coase gateway`` decides.

    ``compute`` takes the place of the gateway; it lives in one event loop, and so can be asked
    asynchronously only. Tools and images are not supported. What an answer was made by and what
    it cost is in its ``response_metadata`` under ``coase``.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    model: str = "auto"
    base_url: str = GATEWAY
    api_key: SecretStr | None = None
    temperature: float = 0.0
    max_tokens: int = 1_024
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    seed: int | None = None
    timeout: float = TIMEOUT_S
    max_retries: int = 2
    """How often a gateway is asked again that could not be reached."""
    compute: Compute | None = Field(default=None, exclude=True)

    @property
    def _llm_type(self) -> str:
        return "coase"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        names = ("model", "base_url", "temperature", "max_tokens", "stop", "seed")
        return {name: getattr(self, name) for name in names}

    # ---- what LangChain calls ------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _joined(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        stream = self._astream(messages, stop, run_manager, **kwargs)
        return _joined([part async for part in stream])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        if self.compute is not None:
            raise ConfigurationError(
                "an engine lives in one event loop: use ainvoke or astream, or a gateway"
            )
        transport = httpx.HTTPTransport(retries=self.max_retries)
        with (
            httpx.Client(transport=transport, timeout=self.timeout) as client,
            client.stream("POST", **self._request(messages, stop, kwargs)) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise _refusal(response.read())
            reader = _Reader()
            for line in response.iter_lines():
                part = reader.take(line)
                if part is not None:
                    if run_manager is not None and part.text:
                        run_manager.on_llm_new_token(part.text, chunk=part)
                    yield part
            reader.check()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        source = self._bought if self.compute is not None else self._asked
        async with aclosing(source(messages, stop, kwargs)) as parts:  # type: ignore[type-var]
            async for part in parts:
                if run_manager is not None and part.text:
                    await run_manager.on_llm_new_token(part.text, chunk=part)
                yield part

    # ---- over a gateway ------------------------------------------------------------------------

    async def _asked(
        self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]
    ) -> AsyncIterator[ChatGenerationChunk]:
        transport = httpx.AsyncHTTPTransport(retries=self.max_retries)
        async with (
            httpx.AsyncClient(transport=transport, timeout=self.timeout) as client,
            client.stream("POST", **self._request(messages, stop, options)) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise _refusal(await response.aread())
            reader = _Reader()
            async for line in response.aiter_lines():
                part = reader.take(line)
                if part is not None:
                    yield part
            reader.check()

    def _request(
        self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        body = {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stop": stop or self.stop,
            "seed": self.seed,
            **options,
            "messages": [{"role": m.role, "content": m.content} for m in conversation(messages)],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {}
        if self.api_key is not None:
            headers["authorization"] = f"Bearer {self.api_key.get_secret_value()}"
        url = f"{self.base_url.rstrip('/')}/v1/chat/completions"
        return {"url": url, "json": body, "headers": headers}

    # ---- over an engine of this process --------------------------------------------------------

    async def _bought(
        self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]
    ) -> AsyncIterator[ChatGenerationChunk]:
        assert self.compute is not None
        model = options.get("model", self.model)
        prompt = Prompt(
            messages=tuple(conversation(messages)),
            model=None if model == "auto" else model,
            max_tokens=options.get("max_tokens", self.max_tokens),
            temperature=options.get("temperature", self.temperature),
            seed=options.get("seed", self.seed),
            stop=tuple(stop or self.stop or ()),
        )
        async with aclosing(self.compute.stream(prompt)) as chunks:
            async for chunk in chunks:
                if chunk.text:
                    yield _part(chunk.text)
                if chunk.done:
                    yield _engine_end(chunk, model)


def conversation(messages: Sequence[BaseMessage]) -> list[Message]:
    """Return LangChain's messages as those of a prompt.

    :raises ValueError: if one is of a kind that no model here reads, or holds more than text
    """
    found = []
    for message in messages:
        role: Role
        match message:
            case SystemMessage():
                role = "system"
            case HumanMessage():
                role = "user"
            case AIMessage():
                role = "assistant"
            case _:
                raise ValueError(f"no model here reads messages of the kind {message.type!r}")
        if isinstance(message.content, list):
            kinds = {p.get("type") for p in message.content if isinstance(p, dict)} - {"text"}
            if kinds:
                raise ValueError(f"no model here reads {', '.join(map(str, kinds))}, only text")
        found.append(Message(role, str(message.text)))
    return found


class _Reader:
    """Turns the lines of a gateway's stream into parts; the last one waits for the usage."""

    def __init__(self) -> None:
        self._ended = False
        self._metadata: dict[str, Any] = {}

    def take(self, line: str) -> ChatGenerationChunk | None:
        """Return the part that a line holds, if it holds any.

        :raises ComputeFailed: if the line says that the answer broke off
        """
        if not line.startswith("data: "):
            return None
        if line == "data: [DONE]":
            return None
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise ComputeFailed(str(event["error"].get("message", event["error"])))
        if event.get("usage"):
            self._ended = True
            usage = event["usage"]
            return _end(
                self._metadata,
                input_tokens=usage["prompt_tokens"],
                output_tokens=usage["completion_tokens"],
            )
        choice = event["choices"][0]
        if choice.get("finish_reason"):
            self._metadata = {
                "model_name": event["model"],
                "finish_reason": choice["finish_reason"],
                "coase": event.get("coase", {}),
            }
        text = choice["delta"].get("content") or ""
        return _part(text) if text else None

    def check(self) -> None:
        """Return if the answer came to its end.

        :raises ComputeFailed: if it did not
        """
        if not self._ended:
            raise ComputeFailed("the gateway broke off in the middle of an answer; ask again")


def _part(text: str) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=text))


def _engine_end(chunk: Chunk, model: str) -> ChatGenerationChunk:
    metadata: dict[str, Any] = {"model_name": model, "finish_reason": chunk.done_reason or "stop"}
    metadata["coase"] = {"made": "local"}
    if isinstance(chunk, BoughtChunk) and chunk.bought:
        deal = chunk.bought[-1]
        metadata["coase"] = {
            "made": "bought",
            "seller": deal.seller,
            "deal": deal.deal,
            "paid": deal.paid,
        }
    usage = chunk.usage
    return _end(
        metadata,
        input_tokens=usage.input_tokens if usage is not None else 0,
        output_tokens=usage.output_tokens if usage is not None else 0,
    )


def _end(metadata: dict[str, Any], *, input_tokens: int, output_tokens: int) -> ChatGenerationChunk:
    return ChatGenerationChunk(
        message=AIMessageChunk(
            content="",
            response_metadata=metadata,
            usage_metadata=UsageMetadata(
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                total_tokens=input_tokens + output_tokens,
            ),
            chunk_position="last",
        )
    )


def _joined(parts: Iterator[ChatGenerationChunk] | list[ChatGenerationChunk]) -> ChatResult:
    texts: list[str] = []
    last: AIMessageChunk | None = None
    for part in parts:
        assert isinstance(part.message, AIMessageChunk)
        texts.append(str(part.message.text))
        last = part.message
    if last is None:
        raise ComputeFailed("there was no answer; ask again")
    message = AIMessage(
        content="".join(texts),
        response_metadata=last.response_metadata,
        usage_metadata=last.usage_metadata,
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def _refusal(content: bytes) -> ComputeFailed:
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = content[:ERROR_SHOWN_MAX_CHARS].decode("utf-8", "replace")
    return ComputeFailed(f"the gateway refused: {message}")
