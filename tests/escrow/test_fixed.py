"""Contracts at the addresses that everybody knows, on new chains and on kept ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from coase.escrow.backends import devchain_node
from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm.abi import Abi
from coase.escrow.backends.evm.artifacts import artifact
from coase.escrow.backends.evm.channels import EvmChannels
from coase.escrow.backends.evm.fixed import (
    AUTHORIZATION_COLLECTOR,
    MULTICALL3,
    PERMIT2,
    PERMIT2_COLLECTOR,
    code_at_fixed_addresses,
)
from coase.escrow.ports import MemoryTxStore
from coase.escrow.voucher import CHANNELS
from coase.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

START_S = 1_800_000_000


def code_at(node: DevNode, address: str) -> bytes:
    return bytes(node.engine.state().get_code(bytes.fromhex(address[2:])))


def call(node: DevNode, name: str, to: str, function: str, *values: object) -> bytes:
    data = Abi(artifact(name).abi).encode(function, *values)
    outcome = node.engine.call(
        node.engine.state(), sender=bytes(20), to=bytes.fromhex(to[2:]), data=data
    )
    assert not outcome.error
    return outcome.output


def test_the_first_block_carries_them() -> None:
    node = DevNode(manual_time_s=START_S)
    for address, code in code_at_fixed_addresses().items():
        assert code_at(node, address) == code
    for name, where in (
        ("ERC3009Collector", AUTHORIZATION_COLLECTOR),
        ("Permit2Collector", PERMIT2_COLLECTOR),
    ):
        assert call(node, name, where, "channels")[12:].hex() == CHANNELS[2:]
    assert call(node, "Permit2Collector", PERMIT2_COLLECTOR, "PERMIT2")[12:].hex() == PERMIT2[2:]
    assert int.from_bytes(call(node, "Multicall3", MULTICALL3, "getChainId"), "big") == 31337


def test_a_kept_chain_keeps_the_code_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = DevNode(state=tmp_path, manual_time_s=START_S)
    begun = code_at(node, CHANNELS)
    root = node.engine.head.state_root
    node.close_disk()
    monkeypatch.setattr(devchain_node, "code_at_fixed_addresses", lambda: {CHANNELS: b"\x00"})
    node = DevNode(state=tmp_path, manual_time_s=START_S)
    assert code_at(node, CHANNELS) == begun
    assert node.engine.head.state_root == root
    node.close_disk()
    fresh = DevNode(manual_time_s=START_S)
    assert code_at(fresh, CHANNELS) == b"\x00"


@pytest.mark.anyio
async def test_a_chain_from_before_goes_on_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devchain_node, "code_at_fixed_addresses", dict)
    DevNode(state=tmp_path, manual_time_s=START_S).close_disk()
    monkeypatch.undo()
    path = tmp_path / "chain.jsonl"
    lines = path.read_text().splitlines()
    first = json.loads(lines[0])
    assert first.pop("fixed") == {}
    path.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")

    node = DevNode(state=tmp_path, manual_time_s=START_S)
    assert code_at(node, CHANNELS) == b""
    await node.serve()
    with pytest.raises(ConfigurationError, match="fresh state"):
        await EvmChannels.connect(node.url, token=node.token, store=MemoryTxStore())
    await node.close()
