"""What a chain says of some keys' money at one block: balances, transfers, fees and nonces.

Everything is read at the same block, so that it adds up while the chain goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import rlp  # type: ignore[import-untyped]

from coase.protocol.errors import ChainUnavailable

from .abi import escrow_abi, token_abi
from .rpc import RpcFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coase.escrow.ports import ChainEvent
    from coase.protocol.types import AgentId

    from .beside import ChannelFacts, StakeFacts
    from .rpc import ChainBlock, Endpoint
    from .settlement import EvmSettlement

LOGS_RANGE_MAX_BLOCKS: Final = 2_000  # What careful public endpoints give at a time.
ADDRESSES_MAX: Final = 100  # Choices of one topic in one question.
_TRANSFER: Final = "Transfer"


@dataclass(frozen=True, slots=True)
class Move:
    """One transfer of the token that is in a block."""

    block: int
    log_index: int
    time_s: int
    tx_hash: str
    source: AgentId
    to: AgentId
    units: int


@dataclass(frozen=True, slots=True)
class Mined:
    """One transaction that is in a block: what it cost, and the coin that it carried."""

    tx_hash: str
    block: int
    time_s: int
    sender: AgentId
    nonce: int
    ok: bool
    fee_wei: int
    to: AgentId
    value_wei: int


@dataclass(frozen=True, slots=True)
class ChainFacts:
    """What the chain says at block ``head``. Amounts are by key."""

    head: int
    time_s: int
    units: dict[AgentId, int]
    wei: dict[AgentId, int]
    owed_units: dict[AgentId, int]
    nonces: dict[AgentId, int]
    """How many transactions of each key are in blocks."""
    held_units: int
    """What the escrow holds in all."""
    events: tuple[ChainEvent, ...] = ()
    moves: tuple[Move, ...] = ()
    mined: dict[str, Mined] = field(default_factory=dict)
    channels: ChannelFacts | None = None
    """What lies in channels; None if it was not asked for, or there are none."""
    stakes: StakeFacts | None = None
    """What lies in a vault in the same token."""


async def settled_head(settlement: EvmSettlement) -> ChainBlock:
    """Return the newest block that counts for ``settlement``, at its depth."""
    endpoint = settlement.chain.endpoint
    newest = await endpoint.latest()
    if not settlement.confirmations:
        return newest
    return await endpoint.block(hex(max(0, newest.number - settlement.confirmations)))


async def read_balances(
    settlement: EvmSettlement, owners: Sequence[AgentId], *, head: ChainBlock | None = None
) -> ChainFacts:
    """Return what ``owners`` hold at the newest block, and the events of the escrow up to there.

    :raises ChainUnavailable: if the endpoint does not answer sensibly
    """
    endpoint = settlement.chain.endpoint
    head = head or await settled_head(settlement)
    events, _ = await settlement.events(0)
    tag, escrow = hex(head.number), settlement.domain.contract

    def call(to: str, data: bytes) -> tuple[str, list[Any]]:
        return "eth_call", [{"to": to, "input": "0x" + data.hex()}, tag]

    token = settlement.asset.token
    asked = [call(token, token_abi().encode("balanceOf", escrow))]
    for owner in owners:
        asked += [
            call(token, token_abi().encode("balanceOf", owner)),
            call(escrow, escrow_abi().encode("owed", owner)),
            ("eth_getBalance", [owner, tag]),
            ("eth_getTransactionCount", [owner, tag]),
        ]
    held, *found = await _numbers(endpoint, asked)
    return ChainFacts(
        head=head.number,
        time_s=head.time_s,
        units=dict(zip(owners, found[0::4], strict=True)),
        owed_units=dict(zip(owners, found[1::4], strict=True)),
        wei=dict(zip(owners, found[2::4], strict=True)),
        nonces=dict(zip(owners, found[3::4], strict=True)),
        held_units=held,
        events=tuple(event for event in events if event.block <= head.number),
    )


async def read_moves(
    settlement: EvmSettlement, owners: Sequence[AgentId], *, first: int, last: int
) -> tuple[Move, ...]:
    """Return the token's transfers from and to ``owners`` in blocks ``first`` to ``last``.

    :raises ChainUnavailable: if the endpoint does not answer sensibly
    """
    endpoint, token = settlement.chain.endpoint, settlement.asset.token
    topic = "0x" + token_abi().topic(_TRANSFER).hex()
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for start in range(0, len(owners), ADDRESSES_MAX):
        words = ["0x" + owner[2:].rjust(64, "0") for owner in owners[start : start + ADDRESSES_MAX]]
        for topics in ([topic, words], [topic, None, words]):
            query = {"address": token, "topics": topics}
            for raw in await logs_of(endpoint, query, first, last):
                if not raw.get("removed"):
                    found[int(raw["blockNumber"], 16), int(raw["logIndex"], 16)] = raw
    times = await times_of(endpoint, [number for number, _ in found])
    try:
        return tuple(
            Move(number, index, times[number], raw["transactionHash"], *_of_transfer(raw))
            for (number, index), raw in sorted(found.items())
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ChainUnavailable(f"{endpoint.url} gives no sensible transfers: {error}") from error


def _of_transfer(raw: dict[str, Any]) -> tuple[AgentId, AgentId, int]:
    # By their place, since not every token calls the fields alike.
    _, source, to = raw["topics"]
    return "0x" + source[-40:], "0x" + to[-40:], int(raw["data"], 16)


async def read_mined(
    settlement: EvmSettlement, raws: dict[str, bytes], *, last: int
) -> dict[str, Mined]:
    """Return which of our transactions, given as bytes by hash, are in blocks up to ``last``.

    :raises ChainUnavailable: if the endpoint does not answer sensibly
    """
    endpoint = settlement.chain.endpoint
    asked = [("eth_getTransactionReceipt", [tx_hash]) for tx_hash in raws]
    try:
        receipts = await endpoint.ask_many(asked) if asked else []
        kept = [r for r in receipts if r is not None and int(r["blockNumber"], 16) <= last]
        times = await times_of(endpoint, [int(r["blockNumber"], 16) for r in kept])
        return {r["transactionHash"]: _mined(r, raws[r["transactionHash"]], times) for r in kept}
    except (RpcFailed, KeyError, TypeError, ValueError) as error:
        raise ChainUnavailable(f"{endpoint.url} gives no sensible receipts: {error}") from error


def _mined(receipt: dict[str, Any], raw: bytes, times: dict[int, int]) -> Mined:
    number = int(receipt["blockNumber"], 16)
    nonce, to, value_wei = order_of(raw)
    price_wei = int(receipt.get("effectiveGasPrice") or "0x0", 16)
    # Rollups charge for the data apart.
    data_fee_wei = int(receipt.get("l1Fee") or "0x0", 16)
    return Mined(
        tx_hash=receipt["transactionHash"],
        block=number,
        time_s=times[number],
        sender=str(receipt["from"]).lower(),
        nonce=nonce,
        ok=receipt["status"] == "0x1",
        fee_wei=int(receipt["gasUsed"], 16) * price_wei + data_fee_wei,
        to=to,
        value_wei=value_wei,
    )


def order_of(raw: bytes) -> tuple[int, AgentId, int]:
    """Return (nonce, to, value) of a signed transaction of type 2.

    :raises ValueError: if it is none
    """
    try:
        fields = rlp.decode(raw[1:])
        number = int.from_bytes
        return number(fields[1], "big"), "0x" + fields[5].hex(), number(fields[6], "big")
    except (rlp.exceptions.RLPException, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no transaction: {error}") from error


async def _numbers(endpoint: Endpoint, asked: list[tuple[str, list[Any]]]) -> list[int]:
    try:
        return [int(answer, 16) for answer in await endpoint.ask_many(asked)]
    except (RpcFailed, TypeError, ValueError) as error:
        raise ChainUnavailable(f"{endpoint.url} tells no balances: {error}") from error


async def logs_of(
    endpoint: Endpoint, query: dict[str, Any], first: int, last: int
) -> list[dict[str, Any]]:
    """Return the logs that ``query`` asks for in blocks ``first`` to ``last``, part by part.

    :raises ChainUnavailable: if the endpoint gives none even of a single block
    """
    found: list[dict[str, Any]] = []
    span = LOGS_RANGE_MAX_BLOCKS
    while first <= last:
        until = min(last, first + span - 1)
        try:
            found += await endpoint.ask(
                "eth_getLogs", query | {"fromBlock": hex(first), "toBlock": hex(until)}
            )
        except RpcFailed as error:
            if until == first:
                raise ChainUnavailable(
                    f"{endpoint.url} gives no logs of block {first}: {error}"
                ) from error
            span = max(1, (until - first + 1) // 4)  # It has a limit of its own.
            continue
        first = until + 1
    return found


async def times_of(endpoint: Endpoint, numbers: Sequence[int]) -> dict[int, int]:
    """Return the times of some blocks.

    :raises ChainUnavailable: if the endpoint does not answer sensibly
    """
    wanted = sorted(set(numbers))
    asked = [("eth_getBlockByNumber", [hex(number), False]) for number in wanted]
    try:
        blocks = await endpoint.ask_many(asked) if asked else []
        return {
            number: int(block["timestamp"], 16)
            for number, block in zip(wanted, blocks, strict=True)
        }
    except (RpcFailed, KeyError, TypeError, ValueError) as error:
        raise ChainUnavailable(f"{endpoint.url} gives no sensible blocks: {error}") from error
