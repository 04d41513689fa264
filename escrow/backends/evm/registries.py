"""ERC-8004's registries and the payments that feedback points at, at any endpoint."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from eth_abi.exceptions import DecodingError

from coase.escrow.feedback import (
    AgentRecord,
    FeedbackEntry,
    GiveFeedback,
    LinkWallet,
    PaymentLog,
    RegisterAgent,
    RegistryCall,
    RevokeFeedback,
    SetAgentUri,
    registry_domain,
)
from coase.escrow.ports import Receipt, Registries
from coase.escrow.voucher import CHANNELS
from coase.protocol.errors import CallReverted, ChainUnavailable, ConfigurationError
from coase.protocol.identity import keccak256
from coase.protocol.types import AgentId, How

from .abi import Abi, escrow_abi, factory_abi
from .artifacts import artifact
from .chain import EvmChain, Request, other_call
from .channels import channels_abi
from .fixed import IDENTITY_REGISTRY, REPUTATION_REGISTRY
from .rpc import RpcFailed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coase.escrow.ports import TxStore
    from coase.protocol.identity import Identity

    from .settlement import EvmSettlement

REGISTRY_GAS: Final = 1_000_000
"""For what is fixed; the rest goes by the length of the texts."""
BYTE_GAS: Final = 1_000
"""A byte of text in storage and in a log costs about 700."""
LOGS_RANGE_MAX_BLOCKS: Final = 2_000  # What careful public endpoints give at a time.
_REGISTER: Final = "register(string)"
_SETTLED: Final = "DealSettled"
_CLAIMED: Final = "Claimed"
_METADATA: Final = "MetadataSet"
_WALLET: Final = b"agentWallet"


@cache
def identity_abi() -> Abi:
    """Return the identity registry's ABI."""
    return Abi(artifact("IdentityRegistry").abi)


@cache
def reputation_abi() -> Abi:
    """Return the reputation registry's ABI, with the errors of the other one."""
    errors = [item for item in artifact("IdentityRegistry").abi if item["type"] == "error"]
    return Abi([*errors, *artifact("ReputationRegistry").abi])


class EvmRegistries(Registries):
    """The registries on a real chain. Make it with ``connect``."""

    def __init__(
        self,
        chain: EvmChain,
        *,
        identity: str,
        reputation: str,
        factory: str,
        confirmations: int,
        channels: str = CHANNELS,
        own_chain: bool = True,
    ) -> None:
        self.chain = chain
        self.domain = registry_domain(chain.chain_id, identity)
        self.reputation = reputation
        self.factory = factory
        self.confirmations = confirmations
        self._channels = channels
        self._own_chain = own_chain

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        factory: str,
        store: TxStore,
        chain_id: int | None = None,
        identity: str = IDENTITY_REGISTRY,
        reputation: str = REPUTATION_REGISTRY,
        confirmations: int = 0,
        **options: Any,
    ) -> EvmRegistries:
        """Return the registries at ``url``.

        ``factory`` says which contracts are escrows; ``confirmations`` is how deep a payment must
        lie to count.

        :raises ChainUnavailable: if the endpoint does not answer
        :raises ConfigurationError: if the registries are not there, or the chain is another one
        """
        chain = await EvmChain.connect(url, store=store, chain_id=chain_id, **options)
        try:
            await require_registries(chain, identity=identity, reputation=reputation)
        except BaseException:
            await chain.close()
            raise
        return cls(
            chain,
            identity=identity,
            reputation=reputation,
            factory=factory,
            confirmations=confirmations,
        )

    @classmethod
    async def beside(
        cls,
        settlement: EvmSettlement,
        *,
        factory: str,
        identity: str = IDENTITY_REGISTRY,
        reputation: str = REPUTATION_REGISTRY,
        channels: str = CHANNELS,
    ) -> EvmRegistries:
        """Return the registries over the connection that ``settlement`` has, and closes.

        ``channels`` is whose claims count as payments, beside the deals of ``factory``'s escrows.

        :raises ConfigurationError: if the registries are not there
        """
        await require_registries(settlement.chain, identity=identity, reputation=reputation)
        return cls(
            settlement.chain,
            identity=identity,
            reputation=reputation,
            factory=factory,
            confirmations=settlement.confirmations,
            channels=channels,
            own_chain=False,
        )

    async def close(self) -> None:
        """Release the connections, if they are not a settlement's. Safe to repeat."""
        if self._own_chain:
            await self.chain.close()

    # -- writing -----------------------------------------------------------------------------

    async def perform(self, effect_id: str, call: RegistryCall, identity: Identity) -> Receipt:
        """Send ``call`` from ``identity`` and return its receipt once it is in a block.

        :raises CallReverted: if a registry refuses it; it is tried before it is sent
        :raises LocalProtocolError: if that id stands for another call
        :raises ChainUnavailable: if it cannot be told whether it went through; repeat it
        """
        to, abi, data = self._call_data(call)
        kept = await self.chain.kept(effect_id)
        if kept is not None and kept[0] != data:
            raise other_call(effect_id)
        request = Request(to, data, REGISTRY_GAS + BYTE_GAS * len(data))
        receipt = await self.chain.send(effect_id, identity, request, abi)
        block = await self.chain.endpoint.block(hex(receipt.block))
        return Receipt(receipt.tx_hash, receipt.block, block.time_s, receipt.gas)

    async def register(self, effect_id: str, uri: str, identity: Identity) -> int:
        """Make a new agent of ``identity`` and return its id. Safe to repeat."""
        receipt = await self.perform(effect_id, RegisterAgent(uri), identity)
        told = await self._receipt(receipt.tx_hash)
        topic = "0x" + identity_abi().topic("Registered").hex()
        for log in told["logs"] if told is not None else ():
            if log["topics"][0] == topic and log["address"].lower() == self.domain.contract:
                return int(log["topics"][1], 16)
        raise ChainUnavailable(f"{self.chain.endpoint.url} tells no event of a registration")

    def _call_data(self, call: RegistryCall) -> tuple[str, Abi, bytes]:
        who, said = identity_abi(), reputation_abi()
        match call:
            case RegisterAgent(uri):
                return self.domain.contract, who, who.encode(_REGISTER, uri)
            case SetAgentUri(agent_id, uri):
                return self.domain.contract, who, who.encode("setAgentURI", agent_id, uri)
            case LinkWallet(agent_id, wallet, deadline_s, signature):
                values = (agent_id, wallet, deadline_s, signature)
                return self.domain.contract, who, who.encode("setAgentWallet", *values)
            case GiveFeedback():
                values = tuple(getattr(call, name) for name in call.__slots__)
                return self.reputation, said, said.encode("giveFeedback", *values)
            case RevokeFeedback(agent_id, index):
                return self.reputation, said, said.encode("revokeFeedback", agent_id, index)

    # -- reading -----------------------------------------------------------------------------

    async def agent(self, agent_id: int, *, block: int | None = None) -> AgentRecord | None:
        """Return what is registered of an agent, now or at a block; None if it is not there.

        A block far in the past asks for an endpoint that keeps old states.
        """
        abi, tag = identity_abi(), "latest" if block is None else hex(block)

        async def ask(name: str) -> Any:
            data = abi.encode(name, agent_id)
            told = await self.chain.call(self.domain.contract, data, abi, tag=tag)
            return abi.functions[name].decode(told)[0]

        try:
            owner, wallet, uri = await asyncio.gather(
                ask("ownerOf"), ask("getAgentWallet"), ask("tokenURI")
            )
        except (CallReverted, DecodingError):  # No such agent, or no registry there at that time.
            return None
        return AgentRecord(agent_id, str(owner).lower(), str(wallet).lower(), str(uri))

    async def feedback(self, agent_id: int, from_block: int = 0) -> list[FeedbackEntry]:
        """Return what was said of an agent from ``from_block`` on, oldest first."""
        abi = reputation_abi()
        given, revoked = abi.topic("NewFeedback"), abi.topic("FeedbackRevoked")
        head = await self.chain.endpoint.latest()
        about = [["0x" + given.hex(), "0x" + revoked.hex()], "0x" + agent_id.to_bytes(32).hex()]
        raws = await self._logs(self.reputation, about, from_block, head.number)
        gone: set[tuple[AgentId, int]] = set()
        found: list[dict[str, Any]] = []
        for raw in raws:
            topics = [bytes.fromhex(topic[2:]) for topic in raw["topics"]]
            fields = abi.events[topics[0]].decode(topics, bytes.fromhex(raw["data"][2:]))
            if topics[0] == revoked:
                gone.add((fields["clientAddress"], fields["feedbackIndex"]))
            else:
                found.append(fields | {"raw": raw})
        numbers = dict.fromkeys(int(one["raw"]["blockNumber"], 16) for one in found)
        blocks = await asyncio.gather(*(self.chain.endpoint.block(hex(one)) for one in numbers))
        times = {block.number: block.time_s for block in blocks}
        return [_entry(one, times, gone) for one in found]

    async def links(self, from_block: int = 0) -> tuple[list[tuple[int, AgentId]], int]:
        """Return which agent was linked to which wallet, oldest first, and the next block to ask.

        Blocks that a fork may still undo are asked for again.
        """
        abi = identity_abi()
        head = await self.chain.endpoint.latest()
        topics = ["0x" + abi.topic(_METADATA).hex(), None, "0x" + keccak256(_WALLET).hex()]
        told: list[tuple[int, AgentId]] = []
        for raw in await self._logs(self.domain.contract, topics, from_block, head.number):
            where = [bytes.fromhex(topic[2:]) for topic in raw["topics"]]
            fields = abi.events[where[0]].decode(where, bytes.fromhex(raw["data"][2:]))
            wallet = bytes(fields["metadataValue"])[-20:]
            told.append((fields["agentId"], "0x" + wallet.rjust(20, b"\0").hex()))
        return told, max(from_block, head.number + 1 - self.confirmations)

    async def payments(self, tx_hash: str) -> list[PaymentLog]:
        """Return the payments of one transaction, in the order of its log; none if not final."""
        told = await self._receipt(tx_hash)
        if told is None or told["status"] != "0x1":
            return []
        head = await self.chain.endpoint.latest()
        number = int(told["blockNumber"], 16)
        if number + self.confirmations > head.number:
            return []
        block = await self.chain.endpoint.block(hex(number))
        # One transaction may settle many deals of one escrow: it is asked about once.
        made = dict.fromkeys(raw["address"].lower() for raw in told["logs"] if _is(raw, _SETTLED))
        escrows = {contract: await self._escrow(contract) for contract in made}
        found = (self._payment(raw, block.time_s, escrows) for raw in told["logs"])
        return [log for log in found if log is not None]

    def _payment(
        self, raw: dict[str, Any], time_s: int, escrows: Mapping[str, tuple[bool, str]]
    ) -> PaymentLog | None:
        contract = raw["address"].lower()
        where = {
            "contract": contract,
            "block": int(raw["blockNumber"], 16),
            "log_index": int(raw["logIndex"], 16),
            "time_s": time_s,
        }
        topics = [bytes.fromhex(topic[2:]) for topic in raw["topics"]]
        data = bytes.fromhex(raw["data"][2:])
        try:
            if _is(raw, _CLAIMED):
                fields = channels_abi().events[topics[0]].decode(topics, data)
                return PaymentLog(
                    **where,
                    is_trusted=contract == self._channels,
                    channel_id=topics[1],
                    to_seller_units=fields["claimAmount"],
                )
            if _is(raw, _SETTLED):
                fields = escrow_abi().events[topics[0]].decode(topics, data)
                trusted, token = escrows[contract]
                return PaymentLog(
                    **where,
                    is_trusted=trusted,
                    job_id=topics[1],
                    buyer=fields["buyer"],
                    seller=fields["seller"],
                    token=token,
                    to_seller_units=fields["toSeller"],
                    how=How(fields["how"]),
                )
        except (DecodingError, ValueError, IndexError):
            return None  # A stranger's contract, whose event only looks like it.
        return None

    async def _escrow(self, contract: str) -> tuple[bool, str]:
        """Return whether the factory made that contract, and the token it holds."""
        data = factory_abi().encode("isEscrow", contract)
        try:
            known = await self.chain.call(self.factory, data, factory_abi())
            if int.from_bytes(known, "big") != 1:
                return False, ""
            token = await self.chain.call(contract, escrow_abi().encode("token"), escrow_abi())
        except CallReverted:
            return False, ""
        return True, "0x" + token[12:32].hex()

    async def _receipt(self, tx_hash: str) -> dict[str, Any] | None:
        try:
            told = await self.chain.endpoint.ask("eth_getTransactionReceipt", tx_hash)
        except RpcFailed:  # What a stranger names need not look like a hash.
            return None
        return told if isinstance(told, dict) else None

    async def _logs(
        self, contract: str, topics: list[Any], first: int, newest: int
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while first <= newest:
            last = min(newest, first + LOGS_RANGE_MAX_BLOCKS - 1)
            query = {
                "address": contract,
                "topics": topics,
                "fromBlock": hex(first),
                "toBlock": hex(last),
            }
            try:
                found += await self.chain.endpoint.ask("eth_getLogs", query)
            except RpcFailed as error:
                url = self.chain.endpoint.url
                raise ChainUnavailable(f"{url} gives no logs: {error}") from error
            first = last + 1
        return found


def _is(raw: dict[str, Any], event: str) -> bool:
    """Return whether a log is that event, whoever raised it."""
    abi = channels_abi() if event == _CLAIMED else escrow_abi()
    return bool(raw["topics"]) and raw["topics"][0] == "0x" + abi.topic(event).hex()


async def require_registries(chain: EvmChain, *, identity: str, reputation: str) -> None:
    """Return if at ``reputation`` is the reputation registry of the identities at ``identity``.

    :raises ConfigurationError: if not
    """
    data = reputation_abi().encode("getIdentityRegistry")
    try:
        found = "0x" + (await chain.call(reputation, data, reputation_abi()))[12:].hex()
    except CallReverted:
        found = ""
    if found != identity:
        raise ConfigurationError(
            f"at {reputation} on chain {chain.chain_id} is no reputation registry of the"
            f" identities at {identity}"
        )


def _entry(
    fields: dict[str, Any], times: dict[int, int], gone: set[tuple[AgentId, int]]
) -> FeedbackEntry:
    raw = fields["raw"]
    number = int(raw["blockNumber"], 16)
    return FeedbackEntry(
        agent_id=fields["agentId"],
        client=fields["clientAddress"],
        index=fields["feedbackIndex"],
        value=fields["value"],
        decimals=fields["valueDecimals"],
        tag1=fields["tag1"],
        tag2=fields["tag2"],
        endpoint=fields["endpoint"],
        uri=fields["feedbackURI"],
        file_hash=fields["feedbackHash"],
        block=number,
        log_index=int(raw["logIndex"], 16),
        time_s=times[number],
        tx_hash=raw["transactionHash"],
        is_revoked=(fields["clientAddress"], fields["feedbackIndex"]) in gone,
    )
