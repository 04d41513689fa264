"""LangChain's messages and tools as those of a prompt, and an answer's parts as LangChain's."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

from coase.agents.compute.ports import Image, Message, Role, Tool, ToolCall, ToolChoice, Usage

# Blocks of a message that say what it says elsewhere, or that only its own model reads.
_PASSED_OVER: Final = ("tool_use", "tool_call", "function_call", "redacted_thinking", "input_json")
_THOUGHTS: Final = {"thinking": "thinking", "reasoning": "reasoning"}


def conversation(messages: Sequence[BaseMessage]) -> list[Message]:
    """Return LangChain's messages as those of a prompt.

    :raises ValueError: if one is of a kind that no model here reads, or holds what none can see
    """
    return [_message(message) for message in messages]


def _message(message: BaseMessage) -> Message:
    role: Role
    more: dict[str, Any] = {}
    match message:
        case SystemMessage():
            role = "system"
        case HumanMessage():
            role = "user"
        case AIMessage():
            role = "assistant"
            more["tool_calls"] = tuple(
                ToolCall(
                    name=call["name"],
                    arguments=json.dumps(call["args"], ensure_ascii=False),
                    id=call["id"] or "",
                )
                for call in message.tool_calls
            )
        case ToolMessage():
            role = "tool"
            more["tool_call_id"] = message.tool_call_id
            more["tool_name"] = message.name or ""
        case _:
            raise ValueError(f"no model here reads messages of the kind {message.type!r}")
    text, thinking, images = _parts(message.content)
    if isinstance(message, AIMessage):
        thinking = thinking or str(message.additional_kwargs.get("reasoning_content") or "")
    return Message(role, text, images=images, thinking=thinking, **more)


def _parts(content: str | list[Any]) -> tuple[str, str, tuple[Image, ...]]:
    """Return text, thoughts and pictures of a message's content."""
    if isinstance(content, str):
        return content, "", ()
    texts: list[str] = []
    thoughts: list[str] = []
    images: list[Image] = []
    for block in content:
        if isinstance(block, str):
            texts.append(block)
            continue
        kind = block.get("type")
        if kind == "text":
            texts.append(str(block.get("text") or ""))
        elif kind in _THOUGHTS:
            thoughts.append(str(block.get(_THOUGHTS[kind]) or ""))
        elif kind in ("image", "image_url"):
            images.append(_image(block))
        elif kind not in _PASSED_OVER:
            raise ValueError(f"no model here reads {kind}, only text and pictures")
    return "".join(texts), "".join(thoughts), tuple(images)


def _image(block: Mapping[str, Any]) -> Image:
    """Return a picture, in whichever of the usual shapes it comes."""
    held = block.get("image_url")
    url = held.get("url") if isinstance(held, dict) else held
    source = block.get("source")
    if isinstance(source, dict):  # Anthropic's shape.
        block = {"base64": source.get("data"), "url": source.get("url")}
    data = block.get("base64") or (block.get("data") if block.get("type") == "image" else None)
    url = str(url or block.get("url") or "")
    if not data and url.startswith("data:"):
        head, _, data = url.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("a picture in an address must be in base64")
    if not data:
        raise ValueError(
            "a picture is given whole (in base64), not by an address: nobody fetches it for you"
        )
    try:
        return Image(base64.b64decode(str(data), validate=True))
    except binascii.Error:
        raise ValueError("a picture is no base64") from None


def tools_of(described: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Return tools that are described as OpenAI's API does."""
    return tuple(
        Tool(
            name=str(tool["function"]["name"]),
            description=str(tool["function"].get("description") or ""),
            parameters=tool["function"].get("parameters") or {"type": "object", "properties": {}},
        )
        for tool in described
    )


def choice_of(choice: Any, tools: tuple[Tool, ...]) -> tuple[tuple[Tool, ...], ToolChoice]:
    """Return the tools that may be called, and whether one has to be.

    One that is forced by its name is then the only one there is.

    :raises ValueError: if none of that name is there
    """
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else choice
    match name:
        case None | "" | False | "auto":
            return tools, "auto"
        case "none":
            return tools, "none"
        case True | "any" | "required":
            return tools, "required"
    forced = tuple(tool for tool in tools if tool.name == name)
    if not forced:
        have = ", ".join(tool.name for tool in tools) or "none"
        raise ValueError(f"tool_choice is {name!r}, and there is: {have}")
    return forced, "required"


def schema_of(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the schema that an answer has to follow, out of OpenAI's description of it.

    :raises ValueError: if it cannot be read
    """
    kind = (response_format or {}).get("type", "text")
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    held = response_format.get("json_schema") if kind == "json_schema" else None
    schema = held.get("schema") if isinstance(held, dict) else None
    if not isinstance(schema, dict):
        raise ValueError("response_format cannot be read")
    return schema


# ---- Answers -----------------------------------------------------------------------------------


def text_part(text: str, thinking: str = "") -> ChatGenerationChunk:
    """Return a piece of an answer, or of what is thought before it."""
    more = {"reasoning_content": thinking} if thinking else {}
    return ChatGenerationChunk(message=AIMessageChunk(content=text, additional_kwargs=more))


def call_part(
    index: int, *, name: str | None, arguments: str, id_: str | None
) -> ChatGenerationChunk:
    """Return a piece of a tool call; pieces of one call have one index."""
    piece = tool_call_chunk(name=name, args=arguments, id=id_, index=index)
    return ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=[piece]))


def last_part(metadata: Mapping[str, Any], usage: Usage) -> ChatGenerationChunk:
    """Return what closes an answer: where it came from and what it took."""
    details = InputTokenDetails(cache_read=usage.cached_input_tokens)
    return ChatGenerationChunk(
        message=AIMessageChunk(
            content="",
            response_metadata=dict(metadata),
            usage_metadata=UsageMetadata(
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                total_tokens=usage.input_tokens + usage.output_tokens,
                input_token_details=details,
            ),
            chunk_position="last",
        )
    )
