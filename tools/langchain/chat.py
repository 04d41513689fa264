"""A chat model for LangChain: over a gateway, or over an engine or market of this very process.

::

    model = ChatCoase(model="qwen3:4b")                       # coase gateway, on this machine
    model = ChatCoase(compute=MarketCompute(buyer, max_price="0.01"))    # ainvoke, astream
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from operator import itemgetter
from typing import Any, Final, Literal

import httpx
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils import secret_from_env
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from coase.agents.compute.market import BoughtChunk
from coase.agents.compute.openai import wire_messages
from coase.agents.compute.ports import Chunk, Compute, Prompt, Usage
from coase.protocol.errors import ComputeFailed, ConfigurationError

from .messages import (
    call_part,
    choice_of,
    conversation,
    last_part,
    schema_of,
    text_part,
    tools_of,
)

GATEWAY: Final = "http://127.0.0.1:11435"
# An answer may be bargained for and made by more than one seller.
TIMEOUT_S: Final = 300
ERROR_SHOWN_MAX_CHARS: Final = 300
Method = Literal["json_schema", "function_calling", "json_mode"]
_OWN: Final = ("model", "max_tokens", "temperature", "seed")
_SAMPLING: Final = ("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty")


class ChatCoase(BaseChatModel):
    """Answers made on this machine or bought, by whatever ``coase gateway`` decides.

    ``compute`` takes the place of the gateway; it lives in one event loop, and so can be asked
    asynchronously only. What an answer was made by and what it cost is in its
    ``response_metadata`` under ``coase``. Pictures must be given whole.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    model: str = "auto"
    base_url: str = GATEWAY
    api_key: SecretStr | None = Field(
        default_factory=secret_from_env("COASE_API_KEY", default=None)
    )
    temperature: float = 0.0
    max_tokens: int = 1_024
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    seed: int | None = None
    timeout: float = TIMEOUT_S
    max_retries: int = 2
    """How often a gateway is asked again that could not be reached."""
    streaming: bool = True
    """Everything streams; here for code that asks for it."""
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
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        stream = self._astream(messages, stop, run_manager, **kwargs)
        return generate_from_stream(iter([part async for part in stream]))

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
                raise refusal(response.read())
            reader = _Reader()
            for line in response.iter_lines():
                for part in reader.take(line):
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

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return the model with tools that it may call.

        ``tool_choice`` is ``auto``, ``none``, ``any`` to have one called, or the name of one.

        :raises ValueError: if ``tool_choice`` names none of them
        """
        described = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        choice_of(tool_choice, tools_of(described))
        more = {} if tool_choice is None else {"tool_choice": tool_choice}
        return self.bind(tools=described, **more, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Method = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """Return the model with answers that fit ``schema``.

        By ``json_schema`` the engine is bound to it, ``function_calling`` makes it a tool that has
        to be called, ``json_mode`` binds to JSON alone.

        :raises ValueError: if there is no such method
        """
        parsed = schema if isinstance(schema, type) and is_basemodel_subclass(schema) else None
        plain = convert_to_json_schema(schema)
        shape = {"kwargs": {"method": method, "strict": strict}, "schema": plain}
        parser: Runnable[Any, Any]
        parser = PydanticOutputParser(pydantic_object=parsed) if parsed else JsonOutputParser()
        bound: Runnable[LanguageModelInput, AIMessage]
        match method:
            case "function_calling":
                name = convert_to_openai_tool(schema)["function"]["name"]
                bound = self.bind_tools(
                    [schema],
                    tool_choice=name,
                    strict=strict,
                    ls_structured_output_format=shape,
                    **kwargs,
                )
                parser = (
                    PydanticToolsParser(tools=[parsed], first_tool_only=True)
                    if parsed
                    else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
                )
            case "json_schema":
                named = {"name": str(plain.get("title") or "answer"), "schema": plain}
                wanted = {"type": "json_schema", "json_schema": {**named, "strict": True}}
                bound = self.bind(
                    response_format=wanted, ls_structured_output_format=shape, **kwargs
                )
            case "json_mode":
                wanted = {"type": "json_object"}
                bound = self.bind(
                    response_format=wanted, ls_structured_output_format=shape, **kwargs
                )
            case _:
                raise ValueError(f"there is no method {method!r}")
        if not include_raw:
            return bound | parser
        good = RunnablePassthrough.assign(
            parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
        )
        bad = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=bound) | good.with_fallbacks([bad], exception_key="parsing_error")

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
                raise refusal(await response.aread())
            reader = _Reader()
            async for line in response.aiter_lines():
                for part in reader.take(line):
                    yield part
            reader.check()

    def _request(
        self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        prompt = self._prompt(messages, stop, options)
        body: dict[str, Any] = {
            **options,
            "model": options.get("model", self.model),
            "messages": wire_messages(prompt),
            "temperature": prompt.temperature,
            "max_tokens": prompt.max_tokens,
            "stop": list(prompt.stop) or None,
            "seed": prompt.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if "tools" in options:
            names = {tool.name for tool in prompt.tools}
            tools = options["tools"]
            body["tools"] = [tool for tool in tools if tool["function"]["name"] in names]
            body["tool_choice"] = prompt.tool_choice
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
        calls = 0
        async with aclosing(self.compute.stream(self._prompt(messages, stop, options))) as chunks:
            async for chunk in chunks:
                if chunk.text or chunk.thinking:
                    yield text_part(chunk.text, chunk.thinking)
                for call in chunk.tool_calls:
                    yield call_part(calls, name=call.name, arguments=call.arguments, id_=call.id)
                    calls += 1
                if chunk.done:
                    yield _engine_end(chunk, options.get("model", self.model))

    def _prompt(
        self, messages: list[BaseMessage], stop: list[str] | None, options: Mapping[str, Any]
    ) -> Prompt:
        asked = {name: options.get(name, getattr(self, name)) for name in _OWN}
        model = asked.pop("model")
        tools, choice = choice_of(options.get("tool_choice"), tools_of(options.get("tools") or ()))
        return Prompt(
            messages=tuple(conversation(messages)),
            model=None if model == "auto" else model,
            stop=tuple(stop or self.stop or ()),
            tools=tools,
            tool_choice=choice,
            response_schema=schema_of(options.get("response_format")),
            **asked,
            **{name: options[name] for name in _SAMPLING if options.get(name) is not None},
        )


class _Reader:
    """Turns the lines of a gateway's stream into parts; the last one waits for the usage."""

    def __init__(self) -> None:
        self._ended = False
        self._metadata: dict[str, Any] = {}

    def take(self, line: str) -> list[ChatGenerationChunk]:
        """Return the parts that a line holds.

        :raises ComputeFailed: if the line says that the answer broke off
        """
        if not line.startswith("data: ") or line == "data: [DONE]":
            return []
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise ComputeFailed(str(event["error"].get("message", event["error"])))
        parts: list[ChatGenerationChunk] = []
        if event.get("choices"):
            choice = event["choices"][0]
            if choice.get("finish_reason"):
                self._metadata = {
                    "model_name": event["model"],
                    "finish_reason": choice["finish_reason"],
                    "coase": event.get("coase", {}),
                }
            delta = choice.get("delta") or {}
            thinking = delta.get("reasoning_content") or delta.get("reasoning") or ""
            if delta.get("content") or thinking:
                parts.append(text_part(delta.get("content") or "", thinking))
            for call in delta.get("tool_calls") or ():
                parts.append(_call_piece(call))
        if event.get("usage"):
            self._ended = True
            parts.append(last_part(self._metadata, _usage(event["usage"])))
        return parts

    def check(self) -> None:
        """Return if the answer came to its end.

        :raises ComputeFailed: if it did not
        """
        if not self._ended:
            raise ComputeFailed("the gateway broke off in the middle of an answer; ask again")


def _call_piece(call: Mapping[str, Any]) -> ChatGenerationChunk:
    function = call.get("function") or {}
    return call_part(
        int(call.get("index") or 0),
        name=function.get("name"),
        arguments=function.get("arguments") or "",
        id_=call.get("id"),
    )


def _usage(told: Mapping[str, Any]) -> Usage:
    details = told.get("prompt_tokens_details") or {}
    return Usage(
        input_tokens=int(told["prompt_tokens"]),
        output_tokens=int(told["completion_tokens"]),
        cached_input_tokens=int(details.get("cached_tokens") or 0),
    )


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
    if (told := chunk.explanation) is not None:
        metadata["coase"] |= {"call": told.call, "explanation": told.brief()}
    return last_part(metadata, chunk.usage or Usage(input_tokens=0, output_tokens=0))


def refusal(content: bytes) -> ComputeFailed:
    """Return the error that a gateway's refusal is."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = content[:ERROR_SHOWN_MAX_CHARS].decode("utf-8", "replace")
    return ComputeFailed(f"the gateway refused: {message}")
