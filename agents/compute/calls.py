"""Tool calls where engines differ: who names a call, and how one is forced by a schema."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .ports import Message, ToolCall, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .ports import Prompt, Tool


def forced(prompt: Prompt) -> bool:
    """Return whether the prompt wants a tool to be called whatever the model thinks of it."""
    return bool(prompt.tools) and prompt.tool_choice == "required"


def linked(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the conversation with every tool call and every result under an id and a name.

    Some programs give ids only, some names only, and results in the order of the calls.
    """
    found: list[Message] = []
    waiting: list[ToolCall] = []
    for at, message in enumerate(messages):
        if message.tool_calls:
            waiting = [
                replace(call, id=call.id or f"call_{at}_{number}")
                for number, call in enumerate(message.tool_calls)
            ]
            message = replace(message, tool_calls=tuple(waiting))
        elif message.role == "tool":
            call = _answered(message, waiting)
            if call is not None:
                waiting = [other for other in waiting if other is not call]
                message = replace(message, tool_call_id=call.id, tool_name=call.name)
        found.append(message)
    return tuple(found)


def _answered(result: Message, waiting: list[ToolCall]) -> ToolCall | None:
    if result.tool_call_id:
        return next((call for call in waiting if call.id == result.tool_call_id), None)
    named = [call for call in waiting if result.tool_name in ("", call.name)]
    return named[0] if named else None


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """Return the JSON Schema of one call of one of these tools.

    A tool's references are to its own schema; here they go to where that stands now.
    """
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                "arguments": {"$ref": f"#/$defs/tool{number}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    defs = {
        f"tool{number}": _moved(tool.parameters or {"type": "object"}, f"#/$defs/tool{number}")
        for number, tool in enumerate(tools)
    }
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": defs}


def call_in(text: str) -> ToolCall | None:
    """Return the call that an answer by :func:`call_schema` is, None if it was cut off."""
    try:
        found = read_json(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = json.dumps(found.get("arguments") or {}, ensure_ascii=False)
    return ToolCall(name=found["name"], arguments=arguments)


def _moved(value: Any, root: str) -> Any:
    if isinstance(value, list):
        return [_moved(part, root) for part in value]
    if not isinstance(value, dict):
        return value
    return {key: _followed(key, part, root) for key, part in value.items()}


def _followed(key: str, value: Any, root: str) -> Any:
    if key == "$ref" and isinstance(value, str) and value.startswith("#"):
        return root + value.removeprefix("#")
    return _moved(value, root)


def described(tool: Tool) -> Mapping[str, Any]:
    """Return a tool in the words that all three APIs' engines take."""
    parameters = dict(tool.parameters) or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}
