"""The network file: private, whole or not at all, and plain words where it cannot be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coase.agents.config import (
    NETWORK_SIZE_MAX_BYTES,
    NatsAddress,
    Network,
    load_network,
    network_path,
    save_network,
)
from coase.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

NETWORK = Network(
    nats=NatsAddress(url="nats://127.0.0.1:4222", user="coase", password="hidden words"),
    rpc="http://127.0.0.1:8545",
    chain_id=31337,
    token="0x" + "11" * 20,
    factory="0x" + "22" * 20,
    escrow="0x" + "33" * 20,
)


def test_what_is_saved_is_loaded_and_nobody_else_reads_it(tmp_path: Path) -> None:
    path = save_network(NETWORK, tmp_path / "deep" / "network.json")
    assert load_network(path) == NETWORK
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
    assert [found.name for found in path.parent.iterdir()] == ["network.json"]


def test_a_network_may_have_a_vault_and_panels(tmp_path: Path) -> None:
    assert (NETWORK.vault, NETWORK.panels) == ("", "")
    places = {"vault": "0x" + "44" * 20, "panels": "0x" + "55" * 20}
    path = save_network(NETWORK.model_copy(update=places), tmp_path / "network.json")
    loaded = load_network(path)
    assert {"vault": loaded.vault, "panels": loaded.panels} == places
    path.write_text(path.read_text().replace("0x44", "44"))
    with pytest.raises(ConfigurationError, match="vault"):
        load_network(path)


def test_the_password_is_not_shown() -> None:
    assert "hidden" not in repr(NETWORK)
    assert "hidden" not in str(NETWORK)


def test_without_a_file_it_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="start one with: coase up"):
        load_network(tmp_path / "network.json")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"net": 1}', '{"unknown": true}', "\x00", "[" * 60_000],
)
def test_garbage_is_named_and_not_shown(tmp_path: Path, content: str) -> None:
    path = tmp_path / "network.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match="not valid"):
        load_network(path)


def test_what_is_no_text_and_what_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "network.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_network(path)
    path.write_text(" " * (NETWORK_SIZE_MAX_BYTES + 1))
    with pytest.raises(ConfigurationError, match="too large"):
        load_network(path)


def test_the_environment_says_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COASE_NETWORK", raising=False)
    monkeypatch.setenv("COASE_HOME", str(tmp_path))
    assert network_path() == tmp_path / "network.json"
    monkeypatch.setenv("COASE_NETWORK", str(tmp_path / "other.json"))
    assert network_path() == tmp_path / "other.json"
