"""What the three APIs give beside text: pictures, tools, schemas, and how to think."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Any, Final

from coase.agents.compute.ports import IMAGE_SIZE_MAX_BYTES, Image, Tool, ToolCall

from .common import Fields, Wrong, new_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from coase.agents.compute.ports import Logprob, Thinking

_LEVELS: Final[dict[str, Thinking]] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}


def picture(encoded: Any, *, where: str) -> Image:
    """Return the picture in a base64 text.

    :raises Wrong: if it is none, or over the size that is taken
    """
    if not isinstance(encoded, str):
        raise Wrong(400, f"{where}: an image must be base64", param=where)
    if len(encoded) * 3 // 4 > IMAGE_SIZE_MAX_BYTES + 2:
        most = IMAGE_SIZE_MAX_BYTES >> 20
        raise Wrong(400, f"{where}: an image is over {most} MiB; make it smaller", param=where)
    try:
        image = Image(base64.b64decode(encoded, validate=True))
    except (binascii.Error, ValueError):
        raise Wrong(400, f"{where}: an image is no base64", param=where) from None
    if not image.media_type:
        raise Wrong(400, f"{where}: an image is no PNG, JPEG, GIF or WebP", param=where)
    return image


def picture_at(url: Any, *, where: str) -> Image:
    """Return the picture in a ``data:`` address; nothing is fetched for a client.

    :raises Wrong: if it is another address, or no picture
    """
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        why = "an image must come with the request, as data:image/png;base64,…"
        raise Wrong(400, f"{where}: {why}; addresses are not fetched", param=where)
    return picture(data, where=where)


def schema_of(value: Any, *, name: str) -> dict[str, Any]:
    """Return a JSON Schema out of a body; whether it is one is seen when the prompt is checked.

    :raises Wrong: if it is no object
    """
    if not isinstance(value, dict):
        raise Wrong(400, f"{name} must be a JSON Schema, an object", param=name)
    return value


def functions_of(fields: Fields) -> tuple[Tool, ...]:
    """Return the tools of a body in the shape that OpenAI and Ollama share.

    :raises Wrong: if one of them is no function
    """
    return tuple(_function(entry, f"tools[{at}]") for at, entry in entries(fields, "tools"))


def _function(entry: dict[str, Any], where: str) -> Tool:
    function = entry.get("function")
    if entry.get("type", "function") != "function" or not isinstance(function, dict):
        raise Wrong(400, f"{where}: only tools of the type function are taken", param=where)
    return tool_of(function, schema="parameters", where=where)


def tool_of(function: dict[str, Any], *, schema: str, where: str) -> Tool:
    """Return a tool whose parameters are under the name ``schema``.

    :raises Wrong: if it has no name, or another field that is none
    """
    held = Fields(function)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise Wrong(400, f"{where} has no name", param=where)
    given = function.get(schema)
    parameters = {} if given is None else schema_of(given, name=f"{where}.{schema}")
    return Tool(name=name, description=held.text("description", ""), parameters=parameters)


def entries(fields: Fields, name: str) -> list[tuple[int, dict[str, Any]]]:
    """Return the objects in a list of a body, with their places.

    :raises Wrong: if it is no list of objects
    """
    value = fields.body.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise Wrong(400, f"{name} must be a list of objects", param=name)
    return list(enumerate(value))


def held_in(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the object under ``name``, an empty one where there is none."""
    held = entry.get(name)
    return held if isinstance(held, dict) else {}


def chosen(tools: tuple[Tool, ...], name: Any) -> tuple[Tool, ...]:
    """Return the one tool that has to be called.

    :raises Wrong: if it is none of them
    """
    found = tuple(tool for tool in tools if tool.name == name)
    if not found:
        raise Wrong(400, f"tool_choice names {name!r}, which is none of the tools")
    return found


def called(name: Any, arguments: Any, *, id_: Any, where: str) -> ToolCall:
    """Return a call that is part of the conversation; arguments are an object, or text of one.

    :raises Wrong: if it has no name
    """
    if not isinstance(name, str) or not name:
        raise Wrong(400, f"{where}: a tool call has no name", param=where)
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
    return ToolCall(name=name, arguments=text, id=id_ if isinstance(id_, str) else "")


def calls_of(fields: Fields, *, where: str) -> tuple[ToolCall, ...]:
    """Return the calls of a message in the shape that OpenAI and Ollama share.

    :raises Wrong: if one of them has no name
    """
    return tuple(
        called(function.get("name"), function.get("arguments"), id_=call.get("id"), where=where)
        for _, call in entries(fields, "tool_calls")
        for function in (held_in(call, "function"),)
    )


def with_ids(calls: Iterable[ToolCall]) -> list[tuple[str, ToolCall]]:
    """Return calls with an id each: the engine's own if it gave one."""
    return [(call.id or new_id("call_"), call) for call in calls]


def scored_token(entry: Logprob) -> dict[str, Any]:
    """Return a token and how likely it was, as OpenAI and Ollama say it."""
    encoded = list(entry.token.encode("utf-8", "surrogatepass"))
    return {"token": entry.token, "logprob": entry.logprob, "bytes": encoded}


def level(value: Any, *, name: str) -> Thinking:
    """Return how hard to think, by the word that clients use; None if nothing was said.

    :raises Wrong: if there is no such word
    """
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str) or value not in _LEVELS:
        raise Wrong(400, f"{name} must be one of {', '.join(_LEVELS)}", param=name)
    return _LEVELS[value]


def texts_of(value: Any, *, name: str) -> list[str]:
    """Return the texts to embed: one, or a list of them.

    :raises Wrong: if it is neither; numbers of tokens mean nothing to another model
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Wrong(400, f"{name} must be a text or a list of texts", param=name)
    return texts


def shortened(vector: Sequence[float], dimensions: int | None) -> list[float]:
    """Return the first so many places of a vector, at length 1 again; all of them without.

    :raises Wrong: if it has fewer
    """
    if dimensions is None or dimensions == len(vector):
        return list(vector)
    if dimensions > len(vector):
        most = len(vector)
        raise Wrong(400, f"dimensions: this model makes {most} at most", param="dimensions")
    kept = vector[:dimensions]
    length = sum(part * part for part in kept) ** 0.5 or 1.0
    return [part / length for part in kept]


def dimensions_of(fields: Fields) -> int | None:
    """Return how long the vectors are to be, if the body says so.

    :raises Wrong: if it is no whole number from 1
    """
    value = fields.body.get("dimensions")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Wrong(400, "dimensions must be a whole number from 1", param="dimensions")
    return value
