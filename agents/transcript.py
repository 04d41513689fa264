"""How an answer of several kinds is one text while it is shown: thinking, words, tool calls.

An answer is mostly words, and then the shown text is exactly those. Where it changes to another
kind, a line of its own says to which: U+001E, the kind, a line feed. What a model itself writes of
U+001E is left out, so that nobody can be led to take words for a tool call.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .compute.ports import Chunk, ToolCall

MARK: Final = "\x1e"
TEXT, THINKING, TOOL_CALL = "text", "thinking", "tool_call"
_KINDS: Final = (TEXT, THINKING, TOOL_CALL)
_MARK_MAX_CHARS: Final = max(len(kind) for kind in _KINDS) + 2


def clean(text: str) -> str:
    """Return ``text`` without the character that separates kinds."""
    return text.replace(MARK, "") if MARK in text else text


@dataclass(slots=True)
class Transcript:
    """Turns the chunks of an answer into the text that is shown of it."""

    _kind: str = TEXT

    def write(self, chunk: Chunk) -> str:
        """Return how the shown text goes on with this chunk."""
        parts = [
            self._part(THINKING, clean(chunk.thinking)),
            self._part(TEXT, clean(chunk.text)),
            *(self._part(TOOL_CALL, _call(call), anew=True) for call in chunk.tool_calls),
        ]
        return "".join(parts)

    def _part(self, kind: str, text: str, *, anew: bool = False) -> str:
        if not text:
            return ""
        head = f"{MARK}{kind}\n" if anew or kind != self._kind else ""
        self._kind = kind
        return head + text


@dataclass(slots=True)
class Shown:
    """What a piece of the shown text holds, by kind."""

    text: str = ""
    thinking: str = ""
    tool_calls: str = ""


@dataclass(slots=True)
class Reading:
    """Takes the shown text apart again, however it was cut into pieces."""

    _kind: str = TEXT
    _mark: str = field(default="", repr=False)

    def take(self, part: str) -> Shown:
        """Return what ``part`` adds; an unknown kind is passed over."""
        shown = Shown()
        part, self._mark = self._mark + part, ""
        while part:
            words, mark, rest = part.partition(MARK)
            self._add(shown, words)
            if not mark:
                break
            kind, line, rest = rest.partition("\n")
            if not line and len(kind) < _MARK_MAX_CHARS:
                self._mark = mark + kind  # Its end comes with the next part.
                break
            self._kind, part = kind, rest
        return shown

    def _add(self, shown: Shown, words: str) -> None:
        if self._kind == TEXT:
            shown.text += words
        elif self._kind == THINKING:
            shown.thinking += words
        elif self._kind == TOOL_CALL:
            shown.tool_calls += words


def _call(call: ToolCall) -> str:
    told = {"name": call.name, "arguments": call.arguments, "id": call.id}
    return json.dumps(told, ensure_ascii=False, separators=(",", ":"))
