"""How deals are told to people: rates that were agreed, and what was called for under them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coase.tools.cli import app, look_commands

if TYPE_CHECKING:
    import pytest

ROW = {
    "deal": "ab" * 16,
    "agent": "0x" + "11" * 20,
    "node": "buyer",
    "side": "buyer",
    "counterparty": "0x" + "22" * 20,
    "capability": "inference-00000000",
    "method": "channel",
    "job_id": "cd" * 32,
    "state": "agreed",
    "how": "open",
    "why": "",
    "open": True,
    "price_units": 108,
    "to_seller_units": 0,
    "to_buyer_units": 0,
    "history": [[1_000, "agreed", "seller", "agreed", 108, ""]],
    "result": "",
}
OVER = {"open": False, "state": "lapsed", "why": "its time is over"}


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **row: Any) -> str:
    monkeypatch.setattr(look_commands, "out", app._console(stderr=False))
    look_commands._print_history({**ROW, **row})
    return capsys.readouterr().out


def test_rates_are_no_open_deal_and_owe_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = printed(capsys, monkeypatch, rates=True)
    assert "rates for calls up to 0.000108; nothing is owed for them" in said
    assert "still open" not in said
    said = printed(capsys, monkeypatch, rates=True, **OVER)
    assert "rates, over: its time is over" in said


def test_a_call_names_its_rates(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = printed(capsys, monkeypatch, contract="ef" * 16)
    assert f"called for under the rates of {'ef' * 16}" in said
    assert "still open: if the buyer stays silent" in said
