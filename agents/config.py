"""Configuration: the network that a node joins, and where its files lie."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from coase.protocol.errors import ConfigurationError
from coase.protocol.terms import Domain
from coase.protocol.types import AddressText, Asset, NetText

NETWORK_FILE: Final = "network.json"
NETWORK_SIZE_MAX_BYTES: Final = 64 * 1024


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NatsAddress(_Model):
    """How the broker is reached. The password never shows in a repr."""

    url: str
    user: str = Field(default="", repr=False)
    password: str = Field(default="", repr=False)
    token: str = Field(default="", repr=False)
    creds_file: str = ""
    ca_file: str = ""


class PanelOfArbiters(_Model):
    """k of n arbiters who rule as one; its address follows from them."""

    address: AddressText
    threshold: int = Field(ge=1, le=16)
    members: tuple[AddressText, ...] = Field(min_length=1, max_length=16)


class Network(_Model):
    """One market: its broker, its chain, its escrow and its arbiters."""

    net: NetText = "local"
    nats: NatsAddress
    rpc: str
    """One endpoint, or several with commas between: the next is for when one is away."""
    chain_id: int
    token: AddressText
    symbol: str = "COASE"
    decimals: int = 6
    factory: AddressText
    escrow: AddressText
    vault: AddressText | Literal[""] = ""
    """The vault of sellers' stakes, where there is one."""
    panels: AddressText | Literal[""] = ""
    """The factory of panels of arbiters, where there is one."""
    panel: PanelOfArbiters | None = None
    """The panel among the arbiters, if one of them is a panel."""
    channels: AddressText | Literal[""] = ""
    """The payment channels, where there are any."""
    identity_registry: AddressText | Literal[""] = ""
    """ERC-8004's registry of agents, where there is one."""
    reputation_registry: AddressText | Literal[""] = ""
    """The registry of what was said of those agents."""
    from_block: int = Field(default=0, ge=0)
    """The block of the escrow's deployment: what came before is not read."""
    block_ms: int = Field(default=0, ge=0)
    """How long a block takes; 0 takes what is known of the chain, or the slowest."""
    confirmations: int | None = Field(default=None, ge=0)
    """How many blocks deep a deal must lie to be believed; without, what suits the chain."""
    head_age_max_s: int | None = Field(default=None, ge=0)
    """How old the newest block may be before an endpoint counts as stale; 0 for any age."""
    fee_max_wei: int = Field(default=0, ge=0)
    """The most that we pay for a unit of gas; 0 takes what suits the chain."""
    funding: str = ""
    """allowance, permit or authorization; empty takes the best that the token offers."""
    arbiters: tuple[AddressText, ...] = ()
    faucet: bool = False
    """Whether the chain gives coin and tokens to whoever asks: local chains only."""
    bank: str = ""
    """On a local chain, the address that minted everything and feeds the faucet."""
    pid: int = 0
    state: str = ""

    @field_validator("rpc", mode="before")
    @classmethod
    def _joined(cls, value: object) -> object:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else value

    @property
    def asset(self) -> Asset:
        """The token in which deals are made."""
        return Asset(self.chain_id, self.token, self.symbol, self.decimals)

    @property
    def domain(self) -> Domain:
        """The EIP-712 domain of the escrow."""
        return Domain(self.chain_id, self.escrow)


def state_home() -> Path:
    """Return where Coase keeps its state: $COASE_HOME, or the desktop standard's place."""
    if home := os.environ.get("COASE_HOME"):
        return Path(home)
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "coase"


def network_path() -> Path:
    """Return where the network file is looked for: $COASE_NETWORK, else the state's home."""
    if path := os.environ.get("COASE_NETWORK"):
        return Path(path)
    return state_home() / NETWORK_FILE


def load_network(path: Path | None = None) -> Network:
    """Return the network that the file describes.

    :raises ConfigurationError: if there is none, or it cannot be used; says what to do
    """
    path = path or network_path()
    try:
        stat = path.stat()
        if stat.st_size > NETWORK_SIZE_MAX_BYTES:
            raise ConfigurationError(f"{path} is too large for a network file")
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigurationError(
            f"no network: {path} does not exist; start one with: coase up"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the network file {path} cannot be read: {error}") from error
    try:
        network = Network.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigurationError(
            f"the network file {path} is not valid: {where or 'document'}: {first['msg']};"
            " remove it and start a network with: coase up"
        ) from None
    _require_private(path, network, stat.st_mode)
    return network


def _require_private(path: Path, network: Network, mode: int) -> None:
    """Return if nobody else may change the file, nor read the broker's password in it.

    Who can write it sends us to a chain and an arbiter of their own.
    """
    secret = network.nats.password or network.nats.token
    if mode & 0o022 or (secret and mode & 0o044):
        what = "written" if mode & 0o022 else "read"
        raise ConfigurationError(
            f"the network file {path} can be {what} by others (mode {mode & 0o777:o});"
            f" if it is yours: chmod 600 {path}"
        )


def save_network(network: Network, path: Path | None = None) -> Path:
    """Write the network file for its owner's eyes only, whole or not at all."""
    path = path or network_path()
    write_private(path, json.dumps(network.model_dump(mode="json"), indent=2) + "\n")
    return path


def write_private(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` with mode 0600, atomically.

    :raises ConfigurationError: if the disk refuses
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror or error}") from error
