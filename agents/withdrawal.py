"""Money out: an order of the owner's, journalled before it is sent, paid once however often it is
repeated.

The owner is not bound by the limits of an agent's purse, and no agent can give such an order: it
comes as a file in the node's own directory, which only its owner can write. A node that runs takes
it from there; where none runs the command does the same by itself.
"""

from __future__ import annotations

import json
import logging
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

from coase.escrow.backends.evm.abi import token_abi
from coase.escrow.backends.evm.chain import Request
from coase.escrow.backends.evm.channels import EvmChannels
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.backends.keystore import KeyRing, names_in
from coase.protocol.errors import (
    CallReverted,
    ChainUnavailable,
    ConfigurationError,
    LocalProtocolError,
)
from coase.protocol.identity import keccak256
from coase.protocol.types import UNITS_MAX, ZERO_ADDRESS, AgentId

from .config import write_private
from .ports import Record
from .snapshot import WITHDRAWAL
from .supervisor import attempt, supervise
from .takeback import Pass, TakeBack, TakeBacks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from coase.protocol.identity import Identity

    from .backends.sqlite import SqliteJournal
    from .node import Node

log = logging.getLogger(__name__)

ORDERS_DIRECTORY: Final = "orders"
ORDER_SIZE_MAX_BYTES: Final = 4096
POLL_S: Final = 0.3
AGAIN_S: Final = 1.0
MENDED_S: Final = 60.0  # By then its owner may have given the key some coin for gas.
TRANSFER_GAS: Final = 200_000  # Our token takes 55,000 at most; others more.
COIN_GAS: Final = 100_000  # To a key it takes 21,000; a wallet that is a contract wants more.
_ID: Final = re.compile(r"[0-9a-z]{1,64}\Z")
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}\Z")


@dataclass(frozen=True, slots=True)
class Order:
    """So much of ``token`` or ``coin`` out of the key ``owner`` to the address ``to``."""

    id: str
    owner: AgentId
    asset: str
    to: AgentId
    units: int

    @property
    def name(self) -> str:
        """How journal and effects call it."""
        return WITHDRAWAL + self.id

    def to_json(self) -> str:
        """Return it as it is written down; amounts as text."""
        return json.dumps(asdict(self) | {"units": str(self.units)})

    @classmethod
    def from_json(cls, data: bytes | str) -> Order:
        """Return the order that was written down.

        :raises ValueError: if it is none
        """
        try:
            row = json.loads(data)
            order = cls(row["id"], row["owner"], row["asset"], row["to"], int(row["units"]))
            good = (
                _ID.match(order.id)
                and _ADDRESS.match(order.owner)
                and _ADDRESS.match(order.to)
                and order.asset in ("token", "coin")
                and 0 < order.units <= UNITS_MAX
            )
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"no order: {error!r}") from error
        if not good:
            raise ValueError("no order of this kind")
        return order


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an order: the transaction that paid it, or why it was refused."""

    tx_hash: str
    why: str = ""


def checksum_address(address: AgentId) -> str:
    """Return an address with the checksum of EIP-55 in the case of its letters."""
    digits = address[2:].lower()
    digest = keccak256(digits.encode()).hex()
    mixed = (c.upper() if int(digest[place], 16) >= 8 else c for place, c in enumerate(digits))
    return "0x" + "".join(mixed)


def checked_address(text: str, *, strict: bool = False) -> AgentId:
    """Return an address in lower case, if its checksum is right.

    ``strict`` refuses one that has none, all of whose letters are of one case.

    :raises ConfigurationError: if it is no address, or mistyped
    """
    if not _ADDRESS.match(text):
        raise ConfigurationError(f"{text!r} is no address: 0x and 40 hex digits")
    digits = text[2:]
    plain = digits in (digits.lower(), digits.upper())
    if not plain and checksum_address(text) != text:
        raise ConfigurationError(f"{text} is mistyped: its checksum (EIP-55) is wrong")
    if plain and strict and not digits.isdigit():
        raise ConfigurationError(
            f"{text} has no checksum, and this is a main chain: copy it in mixed case from where it"
            " comes, as wallets show it"
        )
    if int(digits, 16) == 0:
        raise ConfigurationError("the zero address is nobody: what goes there is lost")
    return text.lower()


def require_order_id(order_id: str) -> None:
    """Return if a withdrawal can be called so.

    :raises ConfigurationError: if not
    """
    if not _ID.match(order_id):
        raise ConfigurationError(
            f"{order_id!r} is no id for a withdrawal: up to 64 small letters and digits"
        )


class Withdrawals:
    """Performs orders of the owner's on one journal and one chain."""

    def __init__(
        self,
        settlement: EvmSettlement,
        journal: SqliteJournal,
        *,
        identity_of: Callable[[AgentId], Identity],
        now_ms: Callable[[], int],
    ) -> None:
        self.settlement, self.journal = settlement, journal
        self._identity_of, self._now_ms = identity_of, now_ms

    def unfinished(self) -> list[Order]:
        """Return the orders that were written down and have no outcome yet, oldest first."""
        rows = self.journal.read(
            "SELECT data FROM records WHERE open = 1 AND kind = 'withdraw' ORDER BY seq"
        )
        return list(dict.fromkeys(Order.from_json(bytes(row[0])) for row in rows))

    def outcome(self, order: Order) -> Outcome | None:
        """Return what became of an order earlier, or None if it is not over.

        :raises LocalProtocolError: if its id stands for another order
        """
        rows = self.journal.read(
            "SELECT kind, data FROM records WHERE deal = ? AND kind IN ('withdraw', 'withdrawn')"
            " ORDER BY seq",
            (order.name,),
        )
        found: Outcome | None = None
        for kind, data in rows:
            if kind == "withdrawn":
                row = json.loads(bytes(data))
                found = Outcome(row["tx"], row["why"])
                continue
            found = None
            known = Order.from_json(bytes(data))
            if known != order:
                raise LocalProtocolError(
                    f"the id {order.id} stands for another withdrawal: {known.units} units of"
                    f" {known.asset} from {known.owner} to {known.to}; nothing was sent"
                )
        return found

    async def perform(self, order: Order) -> Outcome:
        """Pay ``order`` once, and return its outcome. Safe to repeat, after a crash as well.

        One that was refused is tried again, since nothing of it happened.

        :raises ChainUnavailable: if it cannot be told whether it went through; repeat it
        :raises LocalProtocolError: if its id stands for another order
        :raises JournalFailed: if the disk refused; nothing was sent that is not written down
        """
        earlier = self.outcome(order)
        if earlier is not None and earlier.tx_hash:
            return earlier
        if earlier is not None or order not in self.unfinished():
            await self._write(order, "withdraw", order.to_json())
        try:
            outcome = Outcome(await self._pay(order))
        except (CallReverted, ConfigurationError) as error:
            outcome = Outcome("", str(error))
        await self._write(order, "withdrawn", json.dumps(asdict_of(outcome)), over=True)
        return outcome

    async def _pay(self, order: Order) -> str:
        chain, token = self.settlement.chain, self.settlement.asset.token
        identity = self._identity_of(order.owner)
        if order.asset == "coin":
            request = Request(order.to, b"", COIN_GAS, value=order.units)
        else:
            data = token_abi().encode("transfer", order.to, order.units)
            request = Request(token, data, TRANSFER_GAS)
            if await chain.kept(f"{order.name}@{order.owner}") is None:
                answer = await chain.call(token, data, token_abi(), sender=order.owner)
                if answer and not any(answer):
                    raise CallReverted("TransferRefused", order.to, order.units)
        receipt = await chain.send(f"{order.name}@{order.owner}", identity, request, token_abi())
        return receipt.tx_hash

    async def _write(self, order: Order, kind: str, text: str, *, over: bool = False) -> None:
        record = Record(order.owner, order.name, kind, self._now_ms(), text.encode())
        group = self.journal.append([record])
        if over:
            group = self.journal.close_deals(order.owner, [(order.name, b"")])
        await self.journal.durable(group)


def asdict_of(outcome: Outcome) -> dict[str, str]:
    """Return an outcome as the journal keeps it."""
    return {"tx": outcome.tx_hash, "why": outcome.why}


# ---- orders to a node that runs ----------------------------------------------------------------


def place_order(directory: Path, order: Order | TakeBack) -> None:
    """Lay ``order`` where the node that holds ``directory`` looks for it. Safe to repeat.

    :raises ConfigurationError: if the disk refuses
    """
    write_private(_order_path(directory, order.id), order.to_json())


def take_back(directory: Path, order: Order | TakeBack) -> bool:
    """Return whether ``order`` was still lying there, and is withdrawn now: nobody took it."""
    try:
        _order_path(directory, order.id).unlink()
    except FileNotFoundError:
        return False
    return True


def placed(directory: Path) -> list[Order]:
    """Return the orders that lie there and that nobody has taken, or not finished to take."""
    found = []
    for path in sorted((directory / ORDERS_DIRECTORY).glob("*.json*")):
        with suppress(ValueError, OSError):
            found.append(Order.from_json(path.read_bytes()[:ORDER_SIZE_MAX_BYTES]))
    return found


def _order_path(directory: Path, order_id: str) -> Path:
    return directory / ORDERS_DIRECTORY / f"{order_id}.json"


class OwnersOrders:
    """Takes the owner's orders out of a node's directory while the node runs."""

    def __init__(
        self,
        directory: Path,
        withdrawals: Withdrawals,
        *,
        start: Callable[..., Any],
        takebacks: TakeBacks | None = None,
        head_s: Callable[[], int] = lambda: 0,
    ) -> None:
        """``takebacks`` is there where the network has channels; ``head_s`` is the chain's time."""
        self._orders, self._withdrawals = directory / ORDERS_DIRECTORY, withdrawals
        self._takebacks, self._head_s = takebacks, head_s
        self._start = start
        self._taken: set[str] = set()
        self._again: dict[str, Path] = {}
        """Where orders lie that were given once more while they are under way."""

    async def run(self) -> None:
        """Go on with what was begun, then take what comes, until cancelled."""
        for order in self._withdrawals.unfinished():
            self._begin(order)
        for takeback in self._takebacks.unfinished() if self._takebacks is not None else ():
            self._begin(takeback)
        while True:
            for path in self._lying():
                self._take(path)
            await anyio.sleep(POLL_S)

    def _lying(self) -> Iterable[Path]:
        try:
            return sorted(self._orders.glob("*.json*"))
        except OSError:
            return ()

    def _take(self, path: Path) -> None:
        """Make an order ours: after this nobody can take it back."""
        if path.suffix == ".json":
            try:
                path = path.rename(path.with_suffix(".json-taken"))
            except OSError:
                return  # It was taken back.
        elif path.suffix != ".json-taken":
            return
        try:
            order = _order_in(path.read_bytes()[:ORDER_SIZE_MAX_BYTES])
        except (ValueError, OSError) as error:
            log.warning("%s is no order: %s", path, error)
            path.unlink(missing_ok=True)
            return
        self._begin(order, path)

    def _begin(self, order: Order | TakeBack, path: Path | None = None) -> None:
        if isinstance(order, TakeBack) and path is not None:
            self._again[order.name] = path
        name = order.name if isinstance(order, TakeBack) else order.id
        if name not in self._taken:
            self._taken.add(name)
            if isinstance(order, TakeBack):
                self._start(self._bring_home, order)
            else:
                self._start(self._perform, order, path)

    async def _perform(self, order: Order, path: Path | None) -> None:
        """Pay one order, however long the chain is away."""
        while True:
            done = await attempt(lambda: self._withdrawals.perform(order), name=order.name)
            if not isinstance(done, ChainUnavailable):
                break
            await anyio.sleep(AGAIN_S)
        if path is not None:
            await anyio.Path(path).unlink(missing_ok=True)
        self._taken.discard(order.id)

    async def _bring_home(self, order: TakeBack) -> None:
        """Take back what is free in channels, pass after pass, until nothing is left to come."""
        takebacks = self._takebacks
        while takebacks is not None:
            # Whoever waits for its file hears of a whole pass, not of one that was half through.
            path = self._again.pop(order.name, None)
            renewed = path is not None
            done = await attempt(
                partial(takebacks.perform, order, renewed=renewed), name=order.name
            )
            if path is not None and not isinstance(done, ChainUnavailable):
                await anyio.Path(path).unlink(missing_ok=True)
            elif path is not None:
                self._again.setdefault(order.name, path)
            for refused in done.refused if isinstance(done, Pass) else ():
                log.warning("%s: %s", order.name, refused)
            if isinstance(done, Pass) and done.over and order.name not in self._again:
                break
            await self._pause(order, done)
        if (left := self._again.pop(order.name, None)) is not None:
            await anyio.Path(left).unlink(missing_ok=True)  # There are no channels here.
        self._taken.discard(order.name)

    async def _pause(self, order: TakeBack, done: Pass | Exception) -> None:
        """Wait until a pass can do something that the last one could not."""
        if isinstance(done, ChainUnavailable):
            await anyio.sleep(AGAIN_S)
            return
        due_s = done.next_s if isinstance(done, Pass) else 0
        wait_s = None if due_s else AGAIN_S if isinstance(done, Pass) else MENDED_S
        with anyio.move_on_after(wait_s):
            while not self._is_due(order, due_s):  # noqa: ASYNC110
                await anyio.sleep(POLL_S)

    def _is_due(self, order: TakeBack, due_s: int) -> bool:
        return order.name in self._again or bool(due_s and self._head_s() >= due_s)


def _order_in(data: bytes) -> Order | TakeBack:
    """Return the order of either kind that a file holds.

    :raises ValueError: if it is none
    """
    try:
        return TakeBack.from_json(data)
    except ValueError:
        return Order.from_json(data)


def serve_owner(node: Node, journal: SqliteJournal, directory: Path) -> None:
    """Let a node that runs take its owner's orders from ``directory``."""
    if not isinstance(node.settlement, EvmSettlement):
        return

    def identity_of(owner: AgentId) -> Identity:
        seat = node.runtime.seats.get(owner)
        return seat.identity if seat is not None else identity_in(node.seed, directory, owner)

    withdrawals = Withdrawals(
        node.settlement, journal, identity_of=identity_of, now_ms=node.runtime.now_ms
    )
    takebacks: TakeBacks | None = None
    if isinstance(node.channels, EvmChannels):
        takebacks = TakeBacks(
            node.settlement,
            node.channels,
            journal,
            identity_of=identity_of,
            now_ms=node.runtime.now_ms,
            first=node.network.from_block,
            runtime=node.runtime,
        )
    orders = OwnersOrders(
        directory,
        withdrawals,
        start=node.runtime.start,
        takebacks=takebacks,
        head_s=lambda: node.runtime.head.time_s,
    )
    node.runtime.start(supervise, "the owner's orders", orders.run)


def identity_in(keys: Identity | KeyRing, directory: Path, owner: AgentId) -> Identity:
    """Return the key of the address ``owner``, which a node noted.

    :raises ConfigurationError: if this node has no such key
    """
    for name, address in names_in(directory).items():
        if address == owner:
            identity = keys.derive(name)
            if identity.address == owner:
                return identity
    raise ConfigurationError(f"{directory} has no key {owner}")


def require_payable(
    to: AgentId, owner: AgentId, settlement: EvmSettlement, *, channels: str = "", vault: str = ""
) -> None:
    """Return if ``to`` is nobody to whom money is sent by mistake only.

    ``channels`` and ``vault`` are the network's, where it has them.

    :raises ConfigurationError: if it is
    """
    known = {
        owner: "the very key that pays",
        settlement.asset.token: "the token's own contract, which gives nothing back",
        settlement.domain.contract: "the escrow, which takes money by deals only",
        channels: "the channels' contract, which takes money by deposits only",
        vault: "the vault of stakes, which takes money by deposits only",
        ZERO_ADDRESS: "nobody",
    }
    if to in known:
        raise ConfigurationError(f"{to} is {known[to]}: nothing was sent")
