"""One embedded chain as a whole: engine, disk, contracts, faucet, clock and endpoint."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any, Final

from eth.vm.forks.cancun.transactions import CancunTransactionBuilder
from eth_abi.abi import encode as abi_encode

from coase.escrow.voucher import CHANNELS
from coase.protocol.errors import ConfigurationError
from coase.protocol.identity import Identity, keccak256

from .devchain_engine import Account, Block, Engine
from .devchain_http import HttpServer
from .devchain_pool import PoolRefused
from .devchain_rpc import LIMIT_EXCEEDED, Extras, Manual, Rpc, RpcError
from .devchain_state import VERSION, StateFile
from .evm.artifacts import artifact
from .evm.fixed import IDENTITY_REGISTRY, REPUTATION_REGISTRY, code_at_fixed_addresses
from .evm.transaction import created_address, sign_transaction

if TYPE_CHECKING:
    from pathlib import Path

CHAIN_ID_DEFAULT: Final = 31337  # The number that development chains share.
MANUAL_TIME_S: Final = 1_700_000_000  # Where the clock of a test begins.
SEAL_WORK_MAX_S: Final = 0.5  # Half of each second is for the questions of clients.
FAUCET_UNITS: Final = 1_000 * 10**6  # A thousand COASE: some ten thousand small deals.
FAUCET_WEI: Final = 10 * 10**18
FAUCET_UNITS_MAX: Final = 100_000 * 10**6  # One address, ever: a loop must not empty the faucet.
FAUCET_WEI_MAX: Final = 1_000 * 10**18
_DEPLOYER_WEI: Final = 10**27
_KEY_FILE: Final = "deployer.key"
_TRANSFER: Final = keccak256(b"transfer(address,uint256)")[:4]
_DEPLOY_GAS: Final = 12_000_000
_FEE_MAX: Final = 10**11
_TRUST: Final = ((3, "StakeVault"), (4, "PanelFactory"))
"""By the deployer's nonce: after token, factory and the factory's escrow."""


class DevNode:
    """The embedded chain. Build it, ``serve()`` it, ``close()`` it.

    ``state`` keeps it on disk; without, it is gone when the process ends. ``manual_time_s``
    makes a chain for tests: blocks on demand, and a clock that only the test moves.
    The first block holds the contracts that clients know by their address; ``place`` puts more
    there, or other code in their stead.

    :raises ConfigurationError: if the state on disk cannot be carried on
    """

    def __init__(
        self,
        *,
        state: Path | None = None,
        chain_id: int = CHAIN_ID_DEFAULT,
        manual_time_s: int | None = None,
        place: dict[str, Account] | None = None,
        seed: bytes | None = None,
    ) -> None:
        self.manual = None if manual_time_s is None else Manual(manual_time_s)
        self._file = None if state is None else StateFile(state)
        try:
            self._build(chain_id, place or {}, seed)
        except BaseException:
            self.close_disk()
            raise

    def _build(self, chain_id: int, place: dict[str, Account], seed: bytes | None) -> None:
        entries = [] if self._file is None else self._file.read()
        genesis_s = self._first_time() if not entries else int(entries[0]["time_s"])
        if entries and entries[0]["chain_id"] != chain_id:
            raise ConfigurationError(
                f"the chain on disk has chain id {entries[0]['chain_id']}, not {chain_id}"
            )
        self._deployer = Identity(self._deployer_secret(seed, new=not entries))
        self.token = created_address(self._deployer.address, 0)
        self.factory = created_address(self._deployer.address, 1)
        # A kept chain has the code it began with, whatever this version would put there.
        fixed = (
            {where: bytes.fromhex(code) for where, code in entries[0].get("fixed", {}).items()}
            if entries
            else code_at_fixed_addresses()
        )
        place = {where: Account(code=code) for where, code in fixed.items()} | place
        alloc = {bytes.fromhex(where[2:]): account for where, account in place.items()}
        alloc[bytes.fromhex(self._deployer.address[2:])] = Account(balance=_DEPLOYER_WEI)
        self._given: dict[bytes, tuple[int, int]] = {}
        replaying = bool(entries)
        self._live = not replaying
        self.engine = Engine(
            chain_id=chain_id,
            genesis_time_s=genesis_s,
            alloc=alloc,
            next_time=self._next_time,
            journal=self._on_block,
        )
        if replaying:
            self._replay(entries)
        else:
            self._start_new(chain_id, genesis_s, fixed)
        if len(self.engine.blocks) == 1:
            self._deploy()
        self.escrow = self._escrow()
        self.vault, self.panels = (self._deployed(nonce, name) for nonce, name in _TRUST)
        self.channels = self._placed(CHANNELS)
        self.identity_registry = self._placed(IDENTITY_REGISTRY)
        self.reputation_registry = self._placed(REPUTATION_REGISTRY)
        if self.manual is not None:
            self.manual.time_s = max(self.manual.time_s, self.engine.head.time_s)
        extras = Extras(
            faucet=self.give,
            manual=self.manual,
            submitted=self._submitted,
            rewound=self._on_rewind,
        )
        self.rpc = Rpc(self.engine, extras)
        self._http = HttpServer(self.rpc.answer_in_turn)
        self.url = ""

    # -- the beginning -----------------------------------------------------------------------

    def _first_time(self) -> int:
        return int(time.time()) - 2 if self.manual is None else self.manual.time_s

    def _deployer_secret(self, seed: bytes | None, *, new: bool) -> bytes:
        kept = None if self._file is None else self._file.secret(_KEY_FILE)
        if kept is not None:
            return kept
        if not new:
            raise ConfigurationError(
                f"{_KEY_FILE} is missing beside the chain: put it back, or remove the directory "
                "and start a new chain"
            )
        secret = os.urandom(32) if seed is None else keccak256(b"coase/devchain\0" + seed)
        if self._file is not None:
            self._file.keep_secret(_KEY_FILE, secret)
        return secret

    def _start_new(self, chain_id: int, genesis_s: int, fixed: dict[str, bytes]) -> None:
        if self._file is not None:
            self._file.append(
                {
                    "coase_devchain": VERSION,
                    "chain_id": chain_id,
                    "time_s": genesis_s,
                    "hash": self.engine.head.hash.hex(),
                    "fixed": {where: code.hex() for where, code in fixed.items()},
                },
                durable=True,
            )

    def _deploy(self) -> None:
        """Put the contracts into the first block after the genesis, all or none."""
        calls = [
            ("0x", artifact("CoaseToken").bytecode + abi_encode(
                ["address"], [self._deployer.address]
            )),
            ("0x", artifact("EscrowFactory").bytecode),
            (self.factory, keccak256(b"deploy(address)")[:4] + abi_encode(
                ["address"], [self.token]
            )),
            ("0x", artifact("StakeVault").bytecode + abi_encode(
                ["address", "address"], [self.factory, self.token]
            )),
            ("0x", artifact("PanelFactory").bytecode + abi_encode(["address"], [self.factory])),
        ]  # fmt: skip
        for nonce, (to, data) in enumerate(calls):
            self._send(to, data, nonce=nonce, gas=_DEPLOY_GAS)
        block = self.engine.seal()
        if len(block.transactions) != len(calls) or not all(t.ok for t in block.transactions):
            raise ConfigurationError("the contracts of this installation do not deploy")

    def _escrow(self) -> str:
        outcome = self.engine.call(
            self.engine.state(),
            sender=bytes(20),
            to=bytes.fromhex(self.factory[2:]),
            data=keccak256(b"escrowOf(address)")[:4] + abi_encode(["address"], [self.token]),
        )
        return "0x" + outcome.output[12:32].hex()

    def _deployed(self, nonce: int, name: str) -> str:
        """Return where the deployer put that contract, or nothing: older chains have none."""
        address = created_address(self._deployer.address, nonce)
        code = self.engine.state().get_code(bytes.fromhex(address[2:]))
        return address if artifact(name).same_code(code) else ""

    def _placed(self, address: str) -> str:
        """Return the address if the first block has code there, or nothing."""
        return address if self.engine.state().get_code(bytes.fromhex(address[2:])) else ""

    # -- the disk ----------------------------------------------------------------------------

    def _replay(self, entries: list[dict[str, Any]]) -> None:
        where = self._file.directory if self._file is not None else ""
        remedy = (
            f"the chain in {where} was not made by this version, or with other code at fixed "
            "addresses: start it as before, or remove the directory and start a new chain"
        )
        if self.engine.head.hash.hex() != entries[0]["hash"]:
            raise ConfigurationError(f"the first block differs: {remedy}")
        for entry in entries[1:]:
            if "back" in entry:
                self.engine.rewind(int(entry["back"]))
                self._recount()
                continue
            try:
                block = self.engine.replay(
                    [bytes.fromhex(raw) for raw in entry.get("tx", [])], int(entry["t"])
                )
            except PoolRefused as error:
                number = self.engine.head.number + 1
                raise ConfigurationError(f"block {number} fails ({error}): {remedy}") from error
            if "root" in entry and block.state_root.hex() != entry["root"]:
                raise ConfigurationError(f"the state after block {block.number} differs: {remedy}")
        self._live = True

    def _on_block(self, block: Block) -> None:
        for done in block.transactions:
            if "0x" + done.sender.hex() == self._deployer.address:
                self._count(done.raw)
        if self._file is None or not self._live:
            return
        entry: dict[str, Any] = {"t": block.time_s}
        if block.transactions:
            entry["tx"] = [done.raw.hex() for done in block.transactions]
            entry["root"] = block.state_root.hex()
        self._file.append(entry, durable=bool(block.transactions))

    def _recount(self) -> None:
        self._given.clear()
        for block in self.engine.blocks:
            for done in block.transactions:
                if "0x" + done.sender.hex() == self._deployer.address:
                    self._count(done.raw)

    def _on_rewind(self, depth: int) -> None:
        self._recount()
        if self._file is not None:
            self._file.append({"back": depth}, durable=True)

    # -- time --------------------------------------------------------------------------------

    def _next_time(self, parent_s: int) -> int:
        if self.manual is not None:
            return self.manual.next_time(parent_s)
        return max(int(time.time()), parent_s + 1)

    def _submitted(self) -> None:
        if self.manual is not None and self.manual.automatic:
            self.engine.seal()

    async def run(self) -> None:
        """Seal a block at every full second, empty or not, until cancelled."""
        if self.manual is not None:
            await asyncio.Event().wait()
        while True:
            due = int(time.time()) + 1
            await asyncio.sleep(due - time.time())
            # A timer may wake a moment early; two blocks in one second would run ahead.
            await asyncio.sleep(max(0.0, due - time.time()))
            # Work, not time: on a busy machine blocks come late rather than empty.
            end = time.process_time() + SEAL_WORK_MAX_S

            def full(end: float = end) -> bool:
                return time.process_time() > end

            self.engine.seal(full=full)

    # -- the faucet --------------------------------------------------------------------------

    def give(self, who: bytes, units: int | None, wei: int | None) -> dict[str, str]:
        """Send test money to ``who`` and return the hashes of the transactions.

        :raises RpcError: if the address has had its share
        """
        units = FAUCET_UNITS if units is None else units
        wei = FAUCET_WEI if wei is None else wei
        had_units, had_wei = self._promised(who)
        if had_units + units > FAUCET_UNITS_MAX or had_wei + wei > FAUCET_WEI_MAX:
            raise RpcError(
                LIMIT_EXCEEDED,
                f"the faucet gives one address at most {FAUCET_UNITS_MAX} units and "
                f"{FAUCET_WEI_MAX} wei; it has had {had_units} and {had_wei}",
            )
        sent: dict[str, str] = {}
        if wei:
            sent["wei_tx"] = self._send("0x" + who.hex(), b"", value=wei, gas=21_000)
        if units:
            data = _TRANSFER + who.rjust(32, b"\0") + units.to_bytes(32, "big")
            sent["units_tx"] = self._send(self.token, data, gas=200_000)
        return sent

    def _send(
        self, to: str, data: bytes, *, gas: int, value: int = 0, nonce: int | None = None
    ) -> str:
        deployer = self._deployer
        if nonce is None:
            nonce = self.engine.pending_nonce(bytes.fromhex(deployer.address[2:]))
        signed = sign_transaction(
            deployer,
            chain_id=self.engine.chain_id,
            nonce=nonce,
            to=to,
            data=data,
            value=value,
            gas=gas,
            fee_max=_FEE_MAX,
            tip_max=1,
        )
        try:
            self.engine.submit(signed.raw)
        except PoolRefused as error:
            raise RpcError(LIMIT_EXCEEDED, f"the faucet is busy: {error}") from error
        return signed.tx_hash

    def _promised(self, who: bytes) -> tuple[int, int]:
        """What ``who`` has had, and what is on its way to it."""
        units, wei = self._given.get(who, (0, 0))
        for item in self.engine.pool.all():
            if "0x" + item.sender.hex() == self._deployer.address:
                more_to, more_units, more_wei = _gift(item.tx)
                if more_to == who:
                    units, wei = units + more_units, wei + more_wei
        return units, wei

    def _count(self, raw: bytes) -> None:
        to, units, wei = _gift(CancunTransactionBuilder.decode(raw))
        had_units, had_wei = self._given.get(to, (0, 0))
        self._given[to] = (had_units + units, had_wei + wei)

    # -- life --------------------------------------------------------------------------------

    async def serve(self, port: int = 0) -> dict[str, Any]:
        """Open the endpoint and return what a client needs to know."""
        port = await self._http.start(port)
        self.url = f"http://127.0.0.1:{port}"
        return self.facts()

    def facts(self) -> dict[str, Any]:
        """Return what a client needs to know."""
        return {
            "rpc": self.url,
            "chain_id": self.engine.chain_id,
            "token": self.token,
            "symbol": "COASE",
            "decimals": 6,
            "factory": self.factory,
            "escrow": self.escrow,
            "vault": self.vault,
            "panels": self.panels,
            "channels": self.channels,
            "identity_registry": self.identity_registry,
            "reputation_registry": self.reputation_registry,
            "deployer": self._deployer.address,
            "block": self.engine.head.number,
            "manual": self.manual is not None,
        }

    async def close(self) -> None:
        """Close the endpoint and let go of the disk. Safe to repeat."""
        await self._http.close()
        self.close_disk()

    def close_disk(self) -> None:
        """Let go of the state directory. Safe to repeat."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _gift(tx: Any) -> tuple[bytes, int, int]:
    """Return (to, token units, wei) of a transaction of the deployer's."""
    data = bytes(tx.data)
    if data[:4] == _TRANSFER and len(data) == 68:
        return data[16:36], int.from_bytes(data[36:], "big"), 0
    return bytes(tx.to), 0, int(tx.value)
