"""What strangers write commands no terminal: neither as JSON nor as text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.tools.cli import app, look_commands

# Of C0: ESC. Of C1: CSI, which some terminals obey. Then what turns lines round, hides, or breaks.
NASTY = "\x1b[2J\x9b31m\x85\u202egnp.exe\u2066\u2069\u200f\u061c\u2028\u2029\ufeff\U000e0041\ud800"
HONEST = "Grüße, 日本語, 🏮 and a\ttab"


def is_tame(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


@pytest.mark.parametrize("indent", [None, 2])
def test_json_spells_out_what_is_not_for_the_eye(
    capsys: pytest.CaptureFixture[str], indent: int | None
) -> None:
    document = {"result": NASTY, NASTY: [HONEST, NASTY], "n": 1}
    app.emit(document, indent=indent)
    printed = capsys.readouterr().out
    assert is_tame(printed)
    assert json.loads(printed) == document
    assert "\\u202e" in printed
    assert "\\u009b" in printed
    assert "Grüße, 日本語, 🏮" in printed


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_whatever_is_emitted_is_tame_and_says_the_same(document: Any) -> None:
    for indent in (None, 2):
        text = app.json_text(document, indent=indent)
        assert is_tame(text)
        assert json.loads(text) == document


@pytest.mark.parametrize(
    "result", [NASTY, json.dumps({"text": NASTY}, ensure_ascii=False), json.dumps([NASTY])]
)
def test_a_replayed_result_commands_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, result: str
) -> None:
    console = app._console(stderr=False)
    monkeypatch.setattr(look_commands, "out", console)
    monkeypatch.setattr(app, "out", console)
    look_commands._print_result(result)
    printed = capsys.readouterr().out
    assert "gnp.exe" in printed
    assert is_tame(printed)


def test_what_is_said_of_a_stranger_commands_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "err", app._console(stderr=True))
    app.say(f"refused the result: {NASTY} {HONEST}")
    printed = capsys.readouterr().err
    assert "gnp.exe" in printed
    assert "Grüße, 日本語, 🏮" in printed
    assert is_tame(printed.replace("\t", ""))
