"""The escrow contract on the embedded chain passes the suite of all settlements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from coase.escrow.backends.devchain_engine import Account
from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm.abi import token_abi
from coase.escrow.backends.evm.deploy import deploy
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.backends.evm.transaction import created_address, sign_transaction
from coase.escrow.ports import FundingKind, MemoryTxStore, Settlement
from coase.protocol.identity import Identity, keccak256
from tests.conformance.settlement_suite import SettlementSuite
from tests.conformance.settlement_world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coase.protocol.types import AgentId

START_S: Final = 1_800_000_000
POLL_S: Final = 0.002
COIN: Final = 10**18
SEED: Final = b"conformance"
GATE: Final = "0x" + "6a" * 20
"""A token with a blacklist: all of CoaseToken, and a gate in front of ``transfer``."""
BLOCK_SELECTOR: Final = keccak256(b"block(address,bool)")[:4]
NAME: Final = int.from_bytes(b"Coase".ljust(31, b"\0") + bytes((2 * 5,)), "big")
TREASURY: Final = Identity(keccak256(b"treasury"))
SUPPLY_UNITS: Final = 10**12


def gate_code(token: str) -> bytes:
    """Return code that refuses transfers to the blocked and lends itself CoaseToken's for all else.

    Whether an address is blocked stands in the slot of its number.
    """
    return bytes.fromhex(
        "60003560e01c"  # the selector
        "80" "63" + BLOCK_SELECTOR.hex() + "14" "6050" "57"  # block: jump
        "63a9059cbb" "14" "6059" "57"  # transfer: jump
        "5b" "36600060003760006000366000" "73" + token[2:] + "5af4"  # 0x19: lend
        "3d600060003e" "604b" "57" "3d6000fd" "5b" "3d6000f3"  # 0x4b: return
        "5b" "602435600435" "55" "00"  # 0x50: block
        "5b" "60043554" "15" "6019" "57" "60006000fd"  # 0x59: transfer, if not blocked
    )  # fmt: skip


def gate_account() -> Account:
    """Return the gate with the whole supply in the treasury's hands."""
    deployer = Identity(keccak256(b"coase/devchain\0" + SEED)).address
    balance = keccak256(bytes.fromhex(TREASURY.address[2:]).rjust(32, b"\0") + bytes(32))
    return Account(
        code=gate_code(created_address(deployer, 0)),
        storage=((int.from_bytes(balance, "big"), SUPPLY_UNITS), (2, SUPPLY_UNITS), (3, NAME)),
    )


class EvmWorld(World):
    """The embedded chain in this process, its blocks and its clock in the test's hands."""

    can_reorg = True
    can_block = True

    def __init__(self) -> None:
        self.node = DevNode(manual_time_s=START_S, seed=SEED, place={GATE: gate_account()})
        assert self.node.manual is not None
        self.clock = self.node.manual
        self.store = MemoryTxStore()
        self.opened: list[Settlement] = []

    async def start(self) -> None:
        await self.node.serve()
        self.node.give(bytes.fromhex(TREASURY.address[2:]), 0, 100 * COIN)
        self.node.engine.seal()
        facts = await EvmSettlement.connect(
            self.node.url, escrow=self.node.escrow, store=self.store, poll_s=POLL_S
        )
        made = await deploy(facts.chain, TREASURY, token=GATE, factory=self.node.factory)
        await facts.close()
        self.escrow = made.escrow
        self.clock.automatic = False
        self.settlement = await self.another()

    async def mint(self, owner: AgentId, units: int) -> None:
        self.node.give(bytes.fromhex(owner[2:]), 0, COIN)
        if units:
            self._send(token_abi().encode("transfer", owner, units))
        await self.seal()

    def _send(self, data: bytes) -> None:
        nonce = self.node.engine.pending_nonce(bytes.fromhex(TREASURY.address[2:]))
        signed = sign_transaction(
            TREASURY,
            chain_id=self.node.engine.chain_id,
            nonce=nonce,
            to=GATE,
            data=data,
            gas=200_000,
            fee_max=10**11,
            tip_max=1,
        )
        self.node.engine.submit(signed.raw)

    async def set_time(self, time_s: int) -> None:
        self.clock.time_s = time_s

    async def seal(self) -> None:
        if self.node.engine.head.time_s >= self.clock.time_s:
            self.clock.time_s = self.node.engine.head.time_s + 1
        self.node.engine.seal()

    async def pending(self) -> int:
        return len(self.node.engine.pool)

    async def another(
        self, *, confirmations: int = 0, funding: FundingKind = FundingKind.AUTHORIZATION
    ) -> Settlement:
        settlement = await EvmSettlement.connect(
            self.node.url,
            escrow=self.escrow,
            store=self.store,
            confirmations=confirmations,
            funding=funding,
            poll_s=POLL_S,
        )
        self.opened.append(settlement)
        return settlement

    async def reorg(self, depth: int, *, drop: bool) -> None:
        raws = self.node.engine.rewind(depth)
        for raw in raws:
            if not drop:
                self.node.engine.submit(raw)

    async def block(self, owner: AgentId, *, blocked: bool) -> None:
        word = int(blocked).to_bytes(32, "big")
        self._send(BLOCK_SELECTOR + bytes.fromhex(owner[2:]).rjust(32, b"\0") + word)
        await self.seal()

    async def close(self) -> None:
        for settlement in self.opened:
            await settlement.close()
        await self.node.close()


class TestEvmSettlement(SettlementSuite):
    """Every promise of the port, kept by the contract."""

    @pytest.fixture
    async def world(self) -> AsyncIterator[World]:
        world = EvmWorld()
        await world.start()
        yield world
        await world.close()
