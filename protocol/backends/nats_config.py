"""How to reach a NATS broker, and how to keep what opens it out of sight."""

from __future__ import annotations

import base64
import binascii
import re
import ssl
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit, urlunsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from coase.protocol.errors import ConfigurationError
from coase.protocol.subjects import require_net

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_URL: Final = "nats://127.0.0.1:4222"
_DEFAULT_PORT: Final = 4222
_SCHEMES: Final = ("nats", "tls", "ws", "wss")
_TLS_SCHEMES: Final = ("tls", "wss")
_WEB_SCHEMES: Final = ("ws", "wss")
_USERINFO: Final = re.compile(r"(?<=://)\S*@")  # To the last @: a password may hold any of "/?#".
_HIDDEN: Final = "***"
_SECRET_FIELDS: Final = ("password", "token", "nkey_seed")
_CREDS_BLOCK: Final = r"-+BEGIN {name}-+\s*(\S+)\s*-+END {name}-+"
_SEED_PREFIX: Final = 18 << 3  # "S", the first letter of each nkey seed.


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS towards the broker. Its certificate and name are always verified."""

    ca_file: Path | None = None
    """Whom to believe; the system's authorities when None."""
    cert_file: Path | None = None
    key_file: Path | None = None
    hostname: str = ""
    """The name in the broker's certificate, where it is not the one in the URL."""

    def context(self) -> ssl.SSLContext:
        """Return a context that verifies the broker and shows our certificate, if there is one.

        :raises ConfigurationError: if a file is missing or unusable
        """
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.cert_file:
                context.load_cert_chain(self.cert_file, self.key_file)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"the TLS files of the broker cannot be used ({error}); check ca_file"
                f" {self.ca_file}, cert_file {self.cert_file}, key_file {self.key_file}"
            ) from error
        return context


@dataclass(frozen=True, slots=True)
class Server:
    """One address of a broker, without the password that its URL may have carried."""

    url: str
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    tls_hostname: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class NatsConfig:
    """A broker, who we are to it, and how patient we are. Its repr shows no secret.

    Credentials in a URL win over ``user``, ``password`` and ``token``.

    :raises ConfigurationError: if something of it cannot work
    """

    urls: tuple[str, ...] = (DEFAULT_URL,)
    net: str = "local"
    name: str = "coase"
    """Shown by the broker's own tools. Not unique, not secret."""
    user: str = ""
    password: str = ""
    token: str = ""
    creds_file: Path | None = None
    """A NATS .creds file: a user's JWT and the seed of its key. Read at each connection."""
    nkey_seed: str = ""
    """The seed of a user's nkey (``SU...``)."""
    nkey_file: Path | None = None
    tls: Tls | None = None
    """With it, or with a ``tls://`` URL, nothing is ever said to a broker in clear."""
    micro: bool = False
    """Answer ``$SRV.PING``, ``INFO`` and ``STATS``. Off on shared brokers: it tells who is here."""
    follow_cluster: bool = True
    """Also dial the brokers that the one we know tells of. They are shown the same credentials."""

    connect_timeout_s: float = 3.0
    ping_interval_s: float = 5.0
    pong_wait_s: float = 10.0
    """A broker that answers no ping for this long is taken for dead."""
    reconnect_wait_min_s: float = 0.05
    reconnect_wait_max_s: float = 2.0
    send_pending_max_bytes: int = 4 * 1024 * 1024
    """What waits for the socket. 4 MiB are 64 envelopes of the largest size."""
    inbound_pending_max: int = 8192
    """Messages of one subject that wait for their callback; more are slow-consumer drops."""
    inbound_pending_max_bytes: int = 8 * 1024 * 1024

    def __post_init__(self) -> None:
        require_net(self.net)
        if not self.urls:
            raise ConfigurationError("no address of a broker was given")
        self.servers()
        logins = (self.user or self.password, self.token, self.creds_file)
        if sum(map(bool, (*logins, self.nkey_seed or self.nkey_file))) > 1:
            raise ConfigurationError(
                "give the broker one kind of credentials: user and password, a token,"
                " a .creds file, or an nkey"
            )

    def servers(self) -> tuple[Server, ...]:
        """Return every address with its own credentials, secrets taken out of the URL."""
        return tuple(self._server(url) for url in self.urls)

    def wants_tls(self, server: Server) -> bool:
        """Return whether nothing may be said to ``server`` in clear."""
        return self.tls is not None or urlsplit(server.url).scheme in _TLS_SCHEMES

    def login(self) -> NkeyLogin | None:
        """Return the key that signs the broker's nonce, if that is how we log in.

        :raises ConfigurationError: if a file is missing or holds no such key
        """
        if self.creds_file:
            text = _read_text(self.creds_file)
            return NkeyLogin.of_seed(
                _block(text, "USER NKEY SEED", self.creds_file),
                jwt=_block(text, "NATS USER JWT", self.creds_file),
            )
        seed = self.nkey_seed or (_read_text(self.nkey_file) if self.nkey_file else "")
        return NkeyLogin.of_seed(seed.strip()) if seed else None

    def redact(self, text: str) -> str:
        """Return ``text`` without any secret of this configuration."""
        secrets = [getattr(self, name) for name in _SECRET_FIELDS]
        for server in self.servers():
            secrets += [server.password, server.token]
        for secret in filter(None, secrets):
            text = text.replace(secret, _HIDDEN)
        return redact_urls(text)

    def with_url(self, url: str) -> NatsConfig:
        """Return the same configuration for another address."""
        return replace(self, urls=(url,))

    def __repr__(self) -> str:
        parts = []
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in _SECRET_FIELDS:
                value = _HIDDEN if value else ""
            elif item.name == "urls":
                value = tuple(redact_urls(_with_scheme(url)) for url in value)
            parts.append(f"{item.name}={value!r}")
        return f"NatsConfig({', '.join(parts)})"

    def _server(self, url: str) -> Server:
        url = _with_scheme(url)
        shown = redact_urls(url)
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:  # Its text may quote a part of the password.
            raise ConfigurationError(
                f"{shown!r} is no address of a broker (a password in it must be percent-encoded)"
            ) from None
        if parts.scheme not in _SCHEMES or not host:
            raise ConfigurationError(
                f"{shown!r} is no address of a broker: write nats://host:port, tls://host:port,"
                " ws://host:port or wss://host:port"
            )
        web = parts.scheme in _WEB_SCHEMES
        netloc = f"[{host}]" if ":" in host else host
        if port or not web:
            netloc += f":{port or _DEFAULT_PORT}"
        clean = urlunsplit((parts.scheme, netloc, parts.path if web else "", "", ""))
        hostname = self.tls.hostname if self.tls else ""
        if parts.username is None:
            return Server(clean, self.user, self.password, self.token, hostname)
        user = unquote(parts.username)
        if parts.password is None:  # NATS reads a lone user as a token.
            return Server(clean, token=user, tls_hostname=hostname)
        return Server(clean, user, unquote(parts.password), tls_hostname=hostname)


@dataclass(frozen=True, slots=True)
class NkeyLogin:
    """An Ed25519 key in NATS' own spelling, that signs the broker's nonce."""

    public: str
    jwt: str = field(default="", repr=False)
    _key: Ed25519PrivateKey | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of_seed(cls, seed: str, *, jwt: str = "") -> NkeyLogin:
        """Return the login of ``seed``: base32 of two prefix bytes, 32 key bytes, a CRC-16.

        :raises ConfigurationError: if it is no seed; the seed is not shown
        """
        try:
            raw = base64.b32decode(seed + "=" * (-len(seed) % 8))
        except (binascii.Error, ValueError) as error:
            raise ConfigurationError("the nkey seed is not base32 text") from error
        if len(raw) != 36 or raw[0] & 0xF8 != _SEED_PREFIX or _crc16(raw[:34]) != raw[34:]:
            raise ConfigurationError("the nkey seed is damaged, or is no seed (it begins with S)")
        key = Ed25519PrivateKey.from_private_bytes(raw[2:34])
        kind = (raw[0] & 7) << 5 | (raw[1] & 0xF8) >> 3  # User, account or operator.
        public = bytes((kind,)) + key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        text = base64.b32encode(public + _crc16(public)).decode().rstrip("=")
        return cls(text, jwt, key)

    def sign(self, nonce: str) -> bytes:
        """Return the signature of the broker's nonce in base64."""
        if self._key is None:
            raise ConfigurationError("this nkey has no seed")
        return base64.b64encode(self._key.sign(nonce.encode()))


def redact_urls(text: str) -> str:
    """Return ``text`` with user and password of every URL in it hidden."""
    return _USERINFO.sub(_HIDDEN + "@", text)


def _with_scheme(url: str) -> str:
    return url if "://" in url else f"nats://{url}"


def _crc16(data: bytes) -> bytes:
    return binascii.crc_hqx(data, 0).to_bytes(2, "little")


def _read_text(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the broker's credentials {path} cannot be read") from error


def _block(text: str, name: str, path: Path) -> str:
    found = re.search(_CREDS_BLOCK.format(name=name), text)
    if not found:
        raise ConfigurationError(f"{path} is no NATS .creds file: it has no {name}")
    return found[1]
