"""Feedback that counts: every entry is bound to a payment that the chain itself tells of.

The registries are ERC-8004's. They take an entry from anybody about anybody, so all its worth is in
what a reader checks: that its file is the one it names, that the payment in the file is in a log of
a contract that he trusts, was made by who speaks to whom is spoken of, and is used once.

That does not stop wash trading: who pays himself gets the money back and has paid for gas only. So
what is counted is weighed, and all whom the reader has no dealings with share one small weight.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import from_json

from coase.protocol.errors import RemoteProtocolError
from coase.protocol.identity import keccak256
from coase.protocol.terms import Domain, address_word, word
from coase.protocol.types import ZERO_ADDRESS, AgentId, How

from .voucher import CHANNELS, ChannelConfig, channels_domain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

REGISTRATION_TYPE: Final = "https://eips.ethereum.org/EIPS/eip-8004#registration-v1"
FILE_SIZE_MAX_BYTES: Final = 64 * 1024
"""A file of ours has less than one KiB. Strangers' files are read as well."""
STARRED: Final = "starred"
"""The tag of entries that say how good the work was, from 0 to 100."""
DATA_URI: Final = "data:application/json;base64,"
COMPLAINTS: Final = frozenset((How.UNDELIVERED, How.SILENT_SELLER, How.RULED))
"""Outcomes without pay that are the seller's fault, or were ruled to be."""
_WALLET_TYPEHASH: Final = keccak256(
    b"AgentWalletSet(uint256 agentId,address newWallet,address owner,uint256 deadline)"
)


# ---- Identity --------------------------------------------------------------------------------


def registry_domain(chain_id: int, registry: str) -> Domain:
    """Return the EIP-712 domain of an identity registry."""
    return Domain(chain_id, registry, "ERC8004IdentityRegistry", "1")


def wallet_digest(
    domain: Domain, agent_id: int, wallet: AgentId, owner: AgentId, deadline_s: int
) -> bytes:
    """Return what a wallet signs to be the one that an agent is paid to."""
    return domain.digest(
        keccak256(
            _WALLET_TYPEHASH
            + word(agent_id)
            + address_word(wallet)
            + address_word(owner)
            + word(deadline_s)
        )
    )


def registry_name(chain_id: int, registry: str) -> str:
    """Return a registry's name for the whole world."""
    return f"eip155:{chain_id}:{registry}"


def registration_file(
    *,
    name: str,
    description: str,
    services: Mapping[str, str],
    registrations: Iterable[tuple[int, str]] = (),
    image: str = "",
    x402: bool = False,
    active: bool = True,
) -> bytes:
    """Return the file that an agent's URI leads to.

    ``services`` are endpoints by kind (A2A, MCP, web...); ``registrations`` are agent ids with
    the names of their registries.
    """
    return _json(
        {
            "type": REGISTRATION_TYPE,
            "name": name,
            "description": description,
            "image": image,
            "services": [{"name": kind, "endpoint": where} for kind, where in services.items()],
            "x402Support": x402,
            "active": active,
            "registrations": [
                {"agentId": agent_id, "agentRegistry": registry}
                for agent_id, registry in registrations
            ],
            "supportedTrust": ["reputation"],
        }
    )


def data_uri(data: bytes) -> str:
    """Return a URI that carries a file itself: for chains on which nobody minds its size."""
    return DATA_URI + base64.b64encode(data).decode()


def from_data_uri(uri: str) -> bytes | None:
    """Return the file that a URI carries, or None if it only names one."""
    if not uri.startswith(DATA_URI) or len(uri) > FILE_SIZE_MAX_BYTES * 2:
        return None
    try:
        return base64.b64decode(uri[len(DATA_URI) :], validate=True)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """What the identity registry says of an agent."""

    agent_id: int
    owner: AgentId
    wallet: AgentId
    """Zero if none is linked."""
    uri: str

    @property
    def paid_to(self) -> AgentId:
        """Whom its clients pay: its wallet, or its owner while it has none."""
        return self.wallet if self.wallet != ZERO_ADDRESS else self.owner


# ---- Calls -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RegisterAgent:
    """Make a new agent of the sender's, paid to the sender."""

    uri: str


@dataclass(frozen=True, slots=True)
class SetAgentUri:
    """Let an agent's URI lead to another file; its owner sends it."""

    agent_id: int
    uri: str


@dataclass(frozen=True, slots=True)
class LinkWallet:
    """Have an agent paid to ``wallet``, which has signed; the agent's owner sends it."""

    agent_id: int
    wallet: AgentId
    deadline_s: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class GiveFeedback:
    """Say something of an agent; its client sends it."""

    agent_id: int
    value: int
    decimals: int
    tag1: str
    tag2: str
    endpoint: str
    uri: str
    file_hash: bytes


@dataclass(frozen=True, slots=True)
class RevokeFeedback:
    """Take an entry of the sender's back."""

    agent_id: int
    index: int


RegistryCall = RegisterAgent | SetAgentUri | LinkWallet | GiveFeedback | RevokeFeedback


# ---- The file --------------------------------------------------------------------------------


class BadFeedbackFile(RemoteProtocolError):
    """Bytes that are no feedback file with a payment that we understand."""


@dataclass(frozen=True, slots=True)
class PaymentProof:
    """Where a payment can be found: one event in one transaction."""

    payer: AgentId
    payee: AgentId
    chain_id: int
    tx_hash: str
    contract: str
    log_index: int
    job_id: bytes = b""
    channel: ChannelConfig | None = None
    """The one that was claimed, if it was no deal."""


@dataclass(frozen=True, slots=True)
class FeedbackFile:
    """What a client says, and by which payment it is one."""

    registry: str
    agent_id: int
    client: AgentId
    created_at: str
    value: int
    decimals: int
    proof: PaymentProof
    tag1: str = ""
    tag2: str = ""
    endpoint: str = ""

    def encode(self) -> bytes:
        """Return the bytes of the file; their hash is what the entry carries."""
        proof = self.proof
        ours: dict[str, Any] = {"contract": proof.contract, "logIndex": proof.log_index}
        if proof.channel is None:
            ours |= {"method": "escrow", "jobId": "0x" + proof.job_id.hex()}
        else:
            domain = channels_domain(proof.chain_id, proof.contract)
            ours |= {
                "method": "channel",
                "channelId": "0x" + proof.channel.channel_id(domain).hex(),
                "channel": _channel_told(proof.channel),
            }
        told: dict[str, Any] = {
            "agentRegistry": self.registry,
            "agentId": self.agent_id,
            "clientAddress": f"eip155:{proof.chain_id}:{self.client}",
            "createdAt": self.created_at,
            "value": self.value,
            "valueDecimals": self.decimals,
            "proofOfPayment": {
                "fromAddress": proof.payer,
                "toAddress": proof.payee,
                "chainId": str(proof.chain_id),
                "txHash": proof.tx_hash,
            },
            "coase": ours,
        }
        named = {"tag1": self.tag1, "tag2": self.tag2, "endpoint": self.endpoint}
        return _json(told | {name: text for name, text in named.items() if text})

    @classmethod
    def decode(cls, data: bytes) -> FeedbackFile:
        """Return what a file says.

        :raises BadFeedbackFile: if it has no payment in a form that we know
        """
        if len(data) > FILE_SIZE_MAX_BYTES:
            raise BadFeedbackFile(f"{len(data)} bytes")
        try:
            told = from_json(data)  # A stranger's, and it goes no deeper than a machine can.
            paid, ours = told["proofOfPayment"], told["coase"]
            proof = PaymentProof(
                payer=_address(paid["fromAddress"]),
                payee=_address(paid["toAddress"]),
                chain_id=int(paid["chainId"]),
                tx_hash=str(paid["txHash"]).lower(),
                contract=_address(ours["contract"]),
                log_index=int(ours["logIndex"]),
                job_id=_bytes32(ours["jobId"]) if ours["method"] == "escrow" else b"",
                channel=_channel(ours["channel"]) if ours["method"] == "channel" else None,
            )
            return cls(
                registry=str(told["agentRegistry"]).lower(),
                agent_id=int(told["agentId"]),
                client=_address(str(told["clientAddress"]).rpartition(":")[2]),
                created_at=str(told["createdAt"]),
                value=int(told["value"]),
                decimals=int(told["valueDecimals"]),
                proof=proof,
                tag1=str(told.get("tag1", "")),
                tag2=str(told.get("tag2", "")),
                endpoint=str(told.get("endpoint", "")),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadFeedbackFile(f"no feedback file: {error}") from error


def _json(told: Mapping[str, Any]) -> bytes:
    return json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _address(text: object) -> AgentId:
    address = str(text).lower()
    if len(address) != 42 or not address.startswith("0x"):
        raise ValueError(f"{address!r} is no address")
    bytes.fromhex(address[2:])
    return address


def _bytes32(text: object) -> bytes:
    data = bytes.fromhex(str(text).removeprefix("0x"))
    if len(data) != 32:
        raise ValueError(f"{text!r} has not 32 bytes")
    return data


def _channel_told(config: ChannelConfig) -> dict[str, Any]:
    return {
        "payer": config.payer,
        "payerAuthorizer": config.payer_authorizer,
        "receiver": config.receiver,
        "receiverAuthorizer": config.receiver_authorizer,
        "token": config.token,
        "withdrawDelay": config.withdraw_delay_s,
        "salt": "0x" + config.salt.hex(),
    }


def _channel(told: Mapping[str, Any]) -> ChannelConfig:
    delay_s = int(told["withdrawDelay"])
    if not 0 <= delay_s < 2**40:
        raise ValueError("no delay")
    return ChannelConfig(
        payer=_address(told["payer"]),
        payer_authorizer=_address(told["payerAuthorizer"]),
        receiver=_address(told["receiver"]),
        receiver_authorizer=_address(told["receiverAuthorizer"]),
        token=_address(told["token"]),
        withdraw_delay_s=delay_s,
        salt=_bytes32(told["salt"]),
    )


# ---- What the chain says ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FeedbackEntry:
    """One entry of the reputation registry, as its log tells it."""

    agent_id: int
    client: AgentId
    index: int
    value: int
    decimals: int
    tag1: str
    tag2: str
    endpoint: str
    uri: str
    file_hash: bytes
    block: int
    log_index: int
    time_s: int
    tx_hash: str
    is_revoked: bool = False


@dataclass(frozen=True, slots=True)
class PaymentLog:
    """One event by which money went to a seller, in a transaction that succeeded and is final."""

    contract: str
    is_trusted: bool
    """The factory made this escrow, or it is the channels' own contract."""
    block: int
    log_index: int
    time_s: int
    job_id: bytes = b""
    channel_id: bytes = b""
    buyer: AgentId = ""
    seller: AgentId = ""
    token: str = ""
    to_seller_units: int = 0
    how: How = How.OPEN


# ---- Checking --------------------------------------------------------------------------------


class Flaw(StrEnum):
    """Why an entry counts for nothing."""

    REVOKED = "revoked"
    OTHER_FILE = "other_file"
    BAD_FILE = "bad_file"
    FILE_DISAGREES = "file_disagrees"
    OTHER_CHAIN = "other_chain"
    NO_PAYMENT = "no_payment"
    UNTRUSTED_CONTRACT = "untrusted_contract"
    OTHER_PAYMENT = "other_payment"
    OTHER_PAYER = "other_payer"
    OTHER_PAYEE = "other_payee"
    OTHER_ASSET = "other_asset"
    PAID_LATER = "paid_later"
    NOT_FAULTED = "not_faulted"
    """Nothing was paid, and the outcome says nothing against the seller."""
    USED_BEFORE = "used_before"
    UNREADABLE = "unreadable"
    """Its file is not on the chain, or the endpoint does not remember so far back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Whose eyes these are: what is paid in other tokens or on other chains, they do not see."""

    chain_id: int
    registry: str
    """The identity registry's address."""
    tokens: frozenset[str]
    channels: str = CHANNELS
    """The channels whose claims count."""


@dataclass(frozen=True, slots=True)
class Counted:
    """An entry that holds, and what was paid for it. ``complains`` if that was nothing."""

    entry: FeedbackEntry
    log: PaymentLog
    token: str
    complains: bool


def read_entry(
    entry: FeedbackEntry, data: bytes, log: PaymentLog | None, *, paid_to: AgentId, reader: Reader
) -> Counted | Flaw:
    """Return the entry if all holds that makes it count, or the first thing that does not.

    ``data`` are the exact bytes of its file, ``log`` what the chain has at the place that the file
    names, and ``paid_to`` the agent's wallet, or else its owner, at the block of ``log``.
    Whether the payment was used before is told by ``first_uses``.
    """
    if entry.is_revoked:
        return Flaw.REVOKED
    if keccak256(data) != entry.file_hash:
        return Flaw.OTHER_FILE
    try:
        file = FeedbackFile.decode(data)
    except BadFeedbackFile:
        return Flaw.BAD_FILE
    said = (file.agent_id, file.client, file.value, file.decimals, file.tag1, file.tag2)
    if (
        said != (entry.agent_id, entry.client, entry.value, entry.decimals, entry.tag1, entry.tag2)
        or file.registry != registry_name(reader.chain_id, reader.registry).lower()
    ):
        return Flaw.FILE_DISAGREES
    if file.proof.chain_id != reader.chain_id:
        return Flaw.OTHER_CHAIN
    if log is None:
        return Flaw.NO_PAYMENT
    return _read_payment(entry, file.proof, log, paid_to, reader)


def _read_payment(
    entry: FeedbackEntry, proof: PaymentProof, log: PaymentLog, paid_to: AgentId, reader: Reader
) -> Counted | Flaw:
    if log.contract != proof.contract or not log.is_trusted:
        return Flaw.UNTRUSTED_CONTRACT
    if log.log_index != proof.log_index:
        return Flaw.OTHER_PAYMENT
    if proof.channel is not None:
        config = proof.channel
        channel_id = config.channel_id(channels_domain(reader.chain_id, log.contract))
        buyer, seller, token = config.payer, config.receiver, config.token
        if log.contract != reader.channels or log.channel_id != channel_id:
            return Flaw.OTHER_PAYMENT
    else:
        buyer, seller, token = log.buyer, log.seller, log.token
        if not log.job_id or log.job_id != proof.job_id:
            return Flaw.OTHER_PAYMENT
    if not buyer == proof.payer == entry.client:
        return Flaw.OTHER_PAYER
    if not seller == proof.payee == paid_to:
        return Flaw.OTHER_PAYEE
    if token not in reader.tokens:
        return Flaw.OTHER_ASSET
    if (log.block, log.log_index) > (entry.block, entry.log_index):
        return Flaw.PAID_LATER
    complains = log.to_seller_units == 0
    if complains and log.how not in COMPLAINTS:
        return Flaw.NOT_FAULTED
    return Counted(entry, log, token, complains)


def first_uses(found: Sequence[Counted]) -> list[Counted]:
    """Return of all that hold the first for each payment, in the order of the chain."""
    used: set[tuple[str, bytes, tuple[int, int]]] = set()
    first: list[Counted] = []
    for one in sorted(found, key=lambda one: (one.entry.block, one.entry.log_index)):
        # A deal is settled once; a channel is claimed many times, and each claim is a payment.
        log = one.log
        claim = (0, 0) if log.job_id else (log.block, log.log_index)
        payment = (log.contract, log.job_id or log.channel_id, claim)
        if payment not in used:
            used.add(payment)
            first.append(one)
    return first


# ---- Weighing --------------------------------------------------------------------------------


def rating_permille(one: Counted) -> int | None:
    """Return how good an entry finds the work, in thousandths; None if it speaks of other things.

    Whoever was paid nothing for a fault of his own was no good, whatever the number says.
    """
    if one.complains:
        return 0
    best = 100 * 10**one.entry.decimals
    if one.entry.tag1 != STARRED or not 0 <= one.entry.value <= best:
        return None
    return int(one.entry.value * 1_000 // best)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much a payment makes a word weigh, in thousandths."""

    entry_max: int = 20_000
    """What a million units of pay weigh; more does not help."""
    group_max: int = 20_000
    """All of one group together: the friends of one source, or all strangers."""
    half_life_s: int = 90 * 24 * 3600


def weight(one: Counted, *, now_s: int, scale: Scale) -> int:
    """Return the weight of one entry alone: the logarithm of its pay, halved with time."""
    paid = min(_log2_thousandths(1 + one.log.to_seller_units), scale.entry_max)
    if one.complains:
        paid = 1_000  # As if one unit had been paid.
    halvings, rest_s = divmod(max(0, now_s - one.log.time_s), scale.half_life_s)
    paid >>= min(halvings, 64)
    return paid - paid * rest_s // (2 * scale.half_life_s)


def weigh(
    found: Sequence[Counted], *, groups: Mapping[AgentId, str], now_s: int, scale: Scale
) -> list[tuple[Counted, int]]:
    """Return each entry with its weight, no group having more than its share.

    ``groups`` names the group of each client that the reader can tell from others: himself, and
    those he has dealt with. All whom it does not name are one group.
    """
    alone = [(one, weight(one, now_s=now_s, scale=scale)) for one in found]
    totals: dict[str, int] = {}
    for one, units in alone:
        name = groups.get(one.entry.client, "")
        totals[name] = totals.get(name, 0) + units
    weighed: list[tuple[Counted, int]] = []
    for one, units in alone:
        total = totals[groups.get(one.entry.client, "")]
        weighed.append((one, units * min(total, scale.group_max) // total if total else 0))
    return weighed


def _log2_thousandths(number: int) -> int:
    """Return the binary logarithm, straight between powers of two."""
    power = number.bit_length() - 1
    return 1000 * power + (1000 * (number - (1 << power)) >> power)
