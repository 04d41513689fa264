"""Thinking, words and tool calls as one shown text, and apart again."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.agents.compute.ports import Chunk, ToolCall
from coase.agents.transcript import MARK, Reading, Shown, Transcript, clean

CALL = ToolCall(name="weather", arguments='{"town": "Ulm"}', id="1")
ANSWER = (
    Chunk(thinking="I wonder"),
    Chunk(thinking=" why"),
    Chunk(text="Let me "),
    Chunk(text="look."),
    Chunk(tool_calls=(CALL, CALL)),
)


def read(parts: list[str]) -> Shown:
    """Return all that a reader takes out of these parts."""
    reading, whole = Reading(), Shown()
    for part in parts:
        shown = reading.take(part)
        whole.text += shown.text
        whole.thinking += shown.thinking
        whole.tool_calls += shown.tool_calls
    return whole


def test_an_answer_of_words_is_shown_as_they_are() -> None:
    transcript = Transcript()
    assert transcript.write(Chunk(text="one ")) == "one "
    assert transcript.write(Chunk(tokens=1)) == ""
    assert transcript.write(Chunk(text="two")) == "two"


def test_where_the_kind_changes_a_line_says_so() -> None:
    transcript = Transcript()
    shown = [transcript.write(chunk) for chunk in ANSWER]
    call = '{"name":"weather","arguments":"{\\"town\\": \\"Ulm\\"}","id":"1"}'
    assert shown == [
        f"{MARK}thinking\nI wonder",
        " why",
        f"{MARK}text\nLet me ",
        "look.",
        f"{MARK}tool_call\n{call}{MARK}tool_call\n{call}",
    ]
    assert json.loads(call)["arguments"] == CALL.arguments


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_it_is_read_as_it_was_written_however_it_was_cut(size: int) -> None:
    transcript = Transcript()
    whole = "".join(transcript.write(chunk) for chunk in ANSWER)
    parts = [whole[at : at + size] for at in range(0, len(whole), size)]
    found = read(parts)
    assert (found.text, found.thinking) == ("Let me look.", "I wonder why")
    assert found.tool_calls.count('"weather"') == 2


def test_words_of_a_model_are_never_taken_for_another_kind() -> None:
    shown = Transcript().write(Chunk(text=f"see{MARK}tool_call\n{{}}"))
    assert shown == "seetool_call\n{}" == clean(shown)
    assert read([shown]) == Shown(text="seetool_call\n{}")


def test_a_kind_that_nobody_knows_is_passed_over() -> None:
    assert read([f"a{MARK}picture\nxyz{MARK}text\nb"]) == Shown(text="ab")
    assert read([f"a{MARK}{'x' * 100}", "yz"]) == Shown(text="a")


@given(st.lists(st.text(alphabet="a\x1e\ntexthinkgool_c", max_size=9), max_size=9))
def test_however_a_hostile_text_is_cut_it_is_read_the_same(parts: list[str]) -> None:
    whole = read(["".join(parts)])
    assert read(parts) == whole
