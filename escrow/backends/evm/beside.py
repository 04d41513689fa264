"""What a chain says of some keys' money beside the escrow: in channels, and in a vault of stakes.

All of it is read at the block of the balances that it is added to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from eth_abi.exceptions import DecodingError

from coase.escrow.stake import Stake
from coase.escrow.voucher import ChannelConfig, ChannelView, channels_domain
from coase.protocol.errors import ChainUnavailable

from .abi import Abi, token_abi, vault_abi
from .channels import KINDS, READS, channels_abi, collectors_of, event_of, view_of
from .moves import ADDRESSES_MAX, logs_of, times_of
from .rpc import RpcFailed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from coase.escrow.ports import ChannelEvent
    from coase.protocol.terms import Domain
    from coase.protocol.types import AgentId

    from .moves import Move
    from .rpc import Endpoint
    from .settlement import EvmSettlement

_CREATED: Final = "ChannelCreated"
_DEPOSITED: Final = "Deposited"
_CLAIMED: Final = "Claimed"
_SLICE_CLOSED: Final = "SliceClosed"


@dataclass(frozen=True, slots=True)
class Channel:
    """One channel as the chain knows it."""

    config: ChannelConfig
    view: ChannelView


@dataclass(frozen=True, slots=True)
class ChannelFacts:
    """What the chain says of the channels of some keys, as payers and as receivers."""

    domain: Domain
    channels: dict[bytes, Channel] = field(default_factory=dict)
    unpaid: dict[AgentId, int] = field(default_factory=dict)
    """By receiver, what was claimed for it and not paid out yet."""
    events: tuple[ChannelEvent, ...] = ()
    """Those of these channels, oldest first."""
    held_units: int = 0
    """What the contract holds in all."""

    @property
    def takers(self) -> frozenset[AgentId]:
        """Whoever takes and gives what lies in channels: the contract and its collectors."""
        return frozenset((self.domain.contract, *collectors_of(self.domain.contract)))


@dataclass(frozen=True, slots=True)
class SliceEnd:
    """A deal's slice of a stake is no more: what of it was lost went to the buyer."""

    job_id: bytes
    seller: AgentId
    slashed_units: int
    log_index: int
    time_s: int
    tx_hash: str


@dataclass(frozen=True, slots=True)
class StakeFacts:
    """What a vault in the token of the deals holds for some keys."""

    vault: AgentId
    stakes: dict[AgentId, Stake] = field(default_factory=dict)
    owed: dict[AgentId, int] = field(default_factory=dict)
    """What a failed payout left there."""
    ends: tuple[SliceEnd, ...] = ()
    held_units: int = 0


async def read_channels(
    settlement: EvmSettlement,
    owners: Sequence[AgentId],
    known: Iterable[ChannelConfig] = (),
    *,
    contract: AgentId,
    first: int,
    last: int,
    moves: Sequence[Move] = (),
) -> ChannelFacts:
    """Return the channels of ``owners`` as of block ``last``.

    They are ``known``, and whatever their keys deposited into or claimed from since ``first``: so
    those of a lost journal are found again. With their ``moves`` also those that somebody else
    filled with their signature, as a facilitator of x402 does.

    :raises ChainUnavailable: if the endpoint does not answer sensibly
    """
    endpoint, abi = settlement.chain.endpoint, channels_abi()
    domain = channels_domain(settlement.asset.chain_id, contract)
    configs = {one.channel_id(domain): one for one in known}
    try:
        found = await _found(endpoint, contract, owners, first=first, last=last)
        found += await _filled(endpoint, contract, owners, moves)
        unknown = [one for one in dict.fromkeys(found) if one not in configs]
        configs |= await _configs(endpoint, domain, unknown, first=first, last=last)
        token = settlement.asset.token
        ours = set(owners)
        configs = {
            id_: one
            for id_, one in configs.items()
            if one.token == token and (one.payer in ours or one.receiver in ours)
        }
        raws = await _about(endpoint, contract, list(configs), first=first, last=last)
        times = await times_of(endpoint, [int(raw["blockNumber"], 16) for raw in raws])
        asked = [(contract, abi.encode(name, id_)) for id_ in configs for name in READS]
        asked += [(contract, abi.encode("receivers", owner, token)) for owner in owners]
        asked.append((token, token_abi().encode("balanceOf", contract)))
        *told, held = await _calls(endpoint, asked, last)
        views, unpaid = told[: len(configs) * len(READS)], told[len(configs) * len(READS) :]
        time_s = (await endpoint.block(hex(last))).time_s
        return ChannelFacts(
            domain=domain,
            channels={
                id_: Channel(config, view_of(views[place : place + len(READS)], time_s))
                for place, (id_, config) in zip(
                    range(0, len(views), len(READS)), configs.items(), strict=True
                )
            },
            unpaid={
                owner: _difference(answer) for owner, answer in zip(owners, unpaid, strict=True)
            },
            events=tuple(event_of(raw, times[int(raw["blockNumber"], 16)]) for raw in raws),
            held_units=int.from_bytes(held, "big"),
        )
    except (RpcFailed, DecodingError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ChainUnavailable(f"{endpoint.url} does not tell of channels: {error}") from error


def _difference(answer: bytes) -> int:
    claimed, paid = channels_abi().functions["receivers"].decode(answer)
    return int(claimed - paid)


async def _found(
    endpoint: Endpoint, contract: AgentId, owners: Sequence[AgentId], *, first: int, last: int
) -> list[bytes]:
    """Return the ids of the channels into which these keys put money, or from which they took."""
    topics = ["0x" + channels_abi().topic(name).hex() for name in (_DEPOSITED, _CLAIMED)]
    ids: dict[bytes, None] = {}
    for words in _chunks([_word(owner) for owner in owners]):
        query = {"address": contract, "topics": [topics, None, words]}
        for raw in await logs_of(endpoint, query, first, last):
            ids[bytes.fromhex(raw["topics"][1][2:])] = None
    return list(ids)


async def _filled(
    endpoint: Endpoint, contract: AgentId, owners: Sequence[AgentId], moves: Sequence[Move]
) -> list[bytes]:
    """Return the ids of the channels that were filled where these keys paid into some."""
    takers, ours = (contract, *collectors_of(contract)), set(owners)
    told = [move.tx_hash for move in moves if move.source in ours and move.to in takers]
    asked: list[tuple[str, list[Any]]] = [
        ("eth_getTransactionReceipt", [tx_hash]) for tx_hash in dict.fromkeys(told)
    ]
    receipts = await endpoint.ask_many(asked) if asked else []
    topic = "0x" + channels_abi().topic(_DEPOSITED).hex()
    return [
        bytes.fromhex(raw["topics"][1][2:])
        for receipt in receipts
        for raw in receipt["logs"]
        if raw["topics"] and raw["topics"][0] == topic and raw["address"].lower() == contract
    ]


async def _configs(
    endpoint: Endpoint, domain: Domain, ids: Sequence[bytes], *, first: int, last: int
) -> dict[bytes, ChannelConfig]:
    """Return what the channels are that we know by their ids only."""
    abi = channels_abi()
    topic = abi.topic(_CREATED)
    found: dict[bytes, ChannelConfig] = {}
    for words in _chunks(["0x" + one.hex() for one in ids]):
        query = {"address": domain.contract, "topics": ["0x" + topic.hex(), words]}
        for raw in await logs_of(endpoint, query, first, last):
            topics = [bytes.fromhex(one[2:]) for one in raw["topics"]]
            fields = abi.events[topic].decode(topics, bytes.fromhex(raw["data"][2:]))
            config = ChannelConfig(*fields["config"])
            if config.channel_id(domain) == topics[1]:
                found[topics[1]] = config
    return found


async def _about(
    endpoint: Endpoint, contract: AgentId, ids: Sequence[bytes], *, first: int, last: int
) -> list[dict[str, Any]]:
    """Return the log of some channels, oldest first."""
    kinds = ["0x" + channels_abi().topic(name).hex() for name in KINDS]
    raws: list[dict[str, Any]] = []
    for words in _chunks(["0x" + one.hex() for one in ids]):
        query = {"address": contract, "topics": [kinds, words]}
        raws += await logs_of(endpoint, query, first, last)
    raws = [raw for raw in raws if not raw.get("removed")]
    return sorted(raws, key=lambda raw: (int(raw["blockNumber"], 16), int(raw["logIndex"], 16)))


async def read_stakes(
    settlement: EvmSettlement,
    owners: Sequence[AgentId],
    *,
    vault: AgentId,
    first: int,
    last: int,
) -> StakeFacts | None:
    """Return the stakes of ``owners`` as of block ``last``; None if they are in another token.

    :raises ChainUnavailable: if the endpoint does not answer sensibly
    """
    endpoint, abi, token = settlement.chain.endpoint, vault_abi(), settlement.asset.token
    asked = [(vault, abi.encode("token")), (token, token_abi().encode("balanceOf", vault))]
    for owner in owners:
        asked += [(vault, abi.encode("stakeOf", owner)), (vault, abi.encode("owed", owner))]
    try:
        its, held, *told = await _calls(endpoint, asked, last)
        if "0x" + its[-20:].hex() != token:
            return None
        decode = abi.functions["stakeOf"].decode
        stakes = {
            owner: Stake(*decode(answer)) for owner, answer in zip(owners, told[::2], strict=True)
        }
        topics = ["0x" + abi.topic(_SLICE_CLOSED).hex(), _word(settlement.domain.contract)]
        query = {"address": vault, "topics": topics}
        raws = await logs_of(endpoint, query, first, last)
        times = await times_of(endpoint, [int(raw["blockNumber"], 16) for raw in raws])
        return StakeFacts(
            vault=vault,
            stakes=stakes,
            owed={
                owner: int.from_bytes(answer, "big")
                for owner, answer in zip(owners, told[1::2], strict=True)
            },
            ends=tuple(_slice_end(abi, raw, times) for raw in raws),
            held_units=int.from_bytes(held, "big"),
        )
    except (RpcFailed, DecodingError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ChainUnavailable(f"{endpoint.url} does not tell of stakes: {error}") from error


def _slice_end(abi: Abi, raw: dict[str, Any], times: Mapping[int, int]) -> SliceEnd:
    topics = [bytes.fromhex(one[2:]) for one in raw["topics"]]
    fields = abi.events[topics[0]].decode(topics, bytes.fromhex(raw["data"][2:]))
    return SliceEnd(
        job_id=topics[2],
        seller=str(fields["seller"]).lower(),
        slashed_units=fields["slashed"],
        log_index=int(raw["logIndex"], 16),
        time_s=times[int(raw["blockNumber"], 16)],
        tx_hash=raw["transactionHash"],
    )


async def _calls(
    endpoint: Endpoint, asked: Sequence[tuple[AgentId, bytes]], block: int
) -> list[bytes]:
    requests: list[tuple[str, list[Any]]] = [
        ("eth_call", [{"to": to, "input": "0x" + data.hex()}, hex(block)]) for to, data in asked
    ]
    return [bytes.fromhex(str(answer)[2:]) for answer in await endpoint.ask_many(requests)]


def _word(address: AgentId) -> str:
    return "0x" + address[2:].rjust(64, "0")


def _chunks(words: Sequence[str]) -> list[Sequence[str]]:
    """Return the words in such parts as one question may have choices."""
    return [words[at : at + ADDRESSES_MAX] for at in range(0, len(words), ADDRESSES_MAX)]
