"""What machines of one local network tell each other: the network's card, and a sign of life.

The card is what a newcomer needs to take part: chain, contracts, arbiters, and whose answers about
the chain count. The machine that holds the chain signs it, so that any other may pass it on. It has
no secrets: who can ask for it has shown the join code already.
"""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json

from coase.protocol.errors import BadSignature, RemoteError
from coase.protocol.identity import keccak256, recover
from coase.protocol.types import AddressText, NetText

from .config import NatsAddress, Network, write_private

if TYPE_CHECKING:
    from pathlib import Path

    from coase.protocol.identity import Identity

CARD_SIZE_MAX_BYTES: Final = 16 * 1024  # Eight arbiters and a dozen fields: about 1 KiB.
HELLO_SIZE_MAX_BYTES: Final = 2 * 1024
NAME_MAX: Final = 64  # What a machine calls itself.
OWN_FIELDS: Final = frozenset(
    "nats rpc pid state confirmations head_age_max_s fee_max_wei funding".split()
)
"""What each machine has or chooses for itself: never taken from another."""
_DOMAIN: Final = b"coase/card/v1\0"

NodeText = Annotated[str, Field(pattern=r"^[0-9a-f]{16}\z")]
_Version = Annotated[str, Field(max_length=32, pattern=r"^[0-9A-Za-z.+-]*\z")]


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Card(_Closed):
    """One network, as any of its machines may know it."""

    v: Literal[1] = 1
    node: NodeText
    """The machine that holds the chain."""
    key: AddressText
    """Whose signature its answers about the chain bear."""
    version: _Version
    market: dict[str, Any]
    """The fields of the network file that are the same everywhere."""

    @field_validator("market")
    @classmethod
    def _is_a_market(cls, market: dict[str, Any]) -> dict[str, Any]:
        if mine := sorted(OWN_FIELDS & market.keys()):
            raise ValueError(f"each machine chooses {', '.join(mine)} itself")
        made = Network.model_validate({**market, "nats": {"url": "nats://a"}, "rpc": "http://a"})
        if not made.faucet and made.bank:
            raise ValueError("only a local chain has a bank")
        return market

    @classmethod
    def of(cls, network: Network, *, node: str, key: str, version: str) -> Card:
        """Return the card of a network that this machine runs."""
        market = network.model_dump(mode="json", exclude=set(OWN_FIELDS), exclude_defaults=True)
        # Even if it is the usual one: what is usual may be another name in another version.
        market |= {"net": network.net, "symbol": network.symbol, "decimals": network.decimals}
        return cls(market=market, node=node, key=key, version=version)

    def network(self, *, nats: NatsAddress, rpc: str, pid: int, state: str) -> Network:
        """Return the network as one machine sees it."""
        own = {"nats": nats, "rpc": rpc, "pid": pid, "state": state}
        return Network.model_validate({**self.market, **own})

    @property
    def net(self) -> str:
        """The network's name."""
        return str(self.market["net"])

    @property
    def chain_id(self) -> int:
        """The chain in which its deals are settled."""
        return int(self.market["chain_id"])

    @property
    def escrow(self) -> str:
        """The contract that holds the money."""
        return str(self.market["escrow"])

    def sealed(self, identity: Identity) -> bytes:
        """Return it signed: 65 bytes of signature, and the JSON that was signed."""
        body = self.model_dump_json().encode()
        return identity.sign(keccak256(_DOMAIN + body)) + body


def read_card(raw: bytes) -> Card:
    """Return the card in what a machine sent.

    :raises RemoteError: if it is none, is not signed by the key that it names, or is written in
        a newer form; says which
    """
    if not 65 < len(raw) <= CARD_SIZE_MAX_BYTES:
        raise RemoteError("a machine sent something else than a card")
    signature, body = raw[:65], raw[65:]
    try:
        card = Card.model_validate_json(body)
        signer = recover(keccak256(_DOMAIN + body), signature)
    except ValidationError as error:
        raise RemoteError(_unreadable(body)) from error
    except BadSignature as error:
        raise RemoteError("the network's card is signed by nobody") from error
    if signer != card.key:
        raise RemoteError("the network's card is not signed by the machine that holds the chain")
    return card


def _unreadable(body: bytes) -> str:
    """Say whether the other side is merely of another version."""
    try:
        found = from_json(body)
    except ValueError:
        found = None
    if isinstance(found, dict) and found.get("v") != 1:
        version = str(found.get("version", "another"))[:32]
        said = "".join(c for c in version if c.isalnum() or c in ".+-")
        return f"the network runs Coase {said}, whose card this version cannot read: update it"
    return "a machine sent something else than a card"


class Hello(_Closed):
    """A machine's answer to a sign of life."""

    node: NodeText
    name: Annotated[str, Field(max_length=NAME_MAX)]
    version: _Version
    now_ms: Annotated[int, Field(ge=0, lt=2**53)]
    chain: bool
    """Whether it holds the network's chain."""


def read_hello(raw: bytes) -> Hello | None:
    """Return what a machine said, or None if that is no answer."""
    if len(raw) > HELLO_SIZE_MAX_BYTES:
        return None
    try:
        return Hello.model_validate_json(raw)
    except ValidationError:
        return None


class LanState(BaseModel):
    """What a machine keeps of the network that it is in. Holds the join code: mode 0600."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    code: str = Field(default="", repr=False)
    node: NodeText = Field(default_factory=lambda: secrets.token_hex(8))
    net: NetText | None = None
    """The name of the network, where this machine holds its chain."""
    port: int = 0
    """Of the route listener, so that others find it where it was."""
    card: str = ""
    """The signed card in hex, where another machine holds the chain."""


class LanStateFile:
    """Reads and writes a `LanState` in a state directory."""

    def __init__(self, state: Path) -> None:
        self.path = state / "lan.json"

    def load(self) -> LanState | None:
        """Return what is kept; None if there is nothing usable."""
        try:
            return LanState.model_validate_json(self.path.read_text())
        except (OSError, ValidationError, UnicodeDecodeError):
            return None

    def save(self, kept: LanState) -> None:
        """Keep it, whole or not at all.

        :raises ConfigurationError: if the disk refuses
        """
        write_private(self.path, json.dumps(kept.model_dump(mode="json")) + "\n")

    def remove(self) -> bool:
        """Forget all of it; return whether there was something."""
        existed = self.path.exists()
        self.path.unlink(missing_ok=True)
        return existed
