"""Who belongs to a local network, as TLS says it: an authority that each node derives itself.

Every holder of the join code computes the same Ed25519 key and from it, byte for byte, the same
certificate of the authority: no machine is the first, nothing is fetched, and any two nodes that
meet believe each other. Each issues itself a certificate for a key that never leaves it. The code
and the authority's key are in no file that is written here.

What follows from that, and is meant: whoever has the code can issue certificates for any name, so
they prove membership and not which member; and a member cannot be put out, since he would issue
himself another. Who loses a laptop makes a new network with a new code.

No name constraints: this authority is believed only by contexts made here and by the broker's
route port, for which nothing but membership counts, and addresses of a LAN may be public IPv6.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import os
import re
import secrets
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coase.protocol.errors import ConfigurationError, RemoteProtocolError, TransportUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from coase.protocol.joincode import JoinCode

LIFE_S: Final = 30 * 86_400
BACKDATED_S: Final = 86_400  # A laptop whose clock is hours behind still believes the others.
RENEW_AT_PARTS: Final = (1, 3)  # At a third of its life: twenty days of sleep do no harm.
ADDRESSES_MAX: Final = 64  # Of one node; a machine with a hundred container networks names a few.
PROOF_WAIT_MAX_S: Final = 5.0  # On a LAN it takes milliseconds.
DOMAIN: Final = "coase"
CA_NOT_BEFORE: Final = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
CA_NOT_AFTER: Final = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)
CA_SERIAL: Final = 1

_NODE_ID: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
# As OpenSSL numbers them.
_CLOCK_CODES: Final = (9, 10)  # Not valid yet, or any more.
_ADDRESS_CODES: Final = (62, 64)  # A name, or an address, that is not in it.
_LOOPBACK: Final = ("127.0.0.1", "::1")
_KEY_USAGE: Final = dict.fromkeys(
    (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    ),
    False,
)


def require_node_id(node_id: str) -> str:
    """Return ``node_id`` if it may be the name of a node: 1 to 32 of a-z, 0-9 and inner '-'.

    :raises ConfigurationError: otherwise
    """
    if not _NODE_ID.fullmatch(node_id):
        raise ConfigurationError(
            f"{node_id!r} is no name of a node: use 1 to 32 of a-z, 0-9 and '-', not at the ends"
        )
    return node_id


@dataclass(frozen=True, slots=True)
class MeshFiles:
    """The three files that prove membership, each of mode 0600."""

    ca: Path
    cert: Path
    key: Path

    @classmethod
    def of(cls, directory: Path) -> MeshFiles:
        """Return their names in ``directory``, there or not."""
        return cls(directory / "ca.pem", directory / "node.pem", directory / "node.key")


@dataclass(frozen=True, slots=True)
class NodeCertificate:
    """A node's certificate with its key, and the authority's certificate."""

    node_id: str
    addresses: tuple[str, ...]
    """Every address it is good for, loopback included, in canonical spelling."""
    not_after_s: int
    renew_at_s: int
    """When to issue the next one; a third of its life."""
    ca_pem: bytes = field(repr=False)
    cert_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)

    def write(self, directory: Path) -> MeshFiles:
        """Write ca.pem, node.pem and node.key, which nobody else can read at any moment.

        Each is replaced in one step, the three are not: a crash in between leaves a pair that
        does not fit, and a node therefore issues itself a new one whenever it starts.

        :raises ConfigurationError: if the directory cannot be used
        """
        files = MeshFiles.of(directory)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path, content in (
                (files.ca, self.ca_pem),
                (files.key, self.key_pem),
                (files.cert, self.cert_pem),
            ):
                _write_private(path, content)
        except OSError as error:
            raise ConfigurationError(
                f"the certificates cannot be kept in {directory} ({error.strerror}): choose a"
                " directory that this user may write to"
            ) from error
        return files


class MeshAuthority:
    """The authority of one network, the same on every node that has its code."""

    def __init__(self, code: JoinCode) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(code.ca_seed)
        self._certificate = _authority(self._key, f"Coase {code.net}")

    def __repr__(self) -> str:
        return f"MeshAuthority({self._certificate.subject.rfc4514_string()})"

    @property
    def ca_pem(self) -> bytes:
        """The authority's certificate. Ed25519 signs without chance: it is the same everywhere."""
        return self._certificate.public_bytes(Encoding.PEM)

    def issue(
        self, node_id: str, addresses: Iterable[str], *, now_s: int, life_s: int = LIFE_S
    ) -> NodeCertificate:
        """Return a certificate for a fresh key of ``node_id``, good as client and as server.

        It names the node (``<node_id>.coase``), the addresses and loopback, since who dials an
        address wants to find it there. A zone (``fe80::1%eth0``) is left out: it has no place in
        a certificate, and who checks one leaves it out as well.

        :raises ConfigurationError: if a name or an address is none, or there are too many
        """
        require_node_id(node_id)
        named = dict.fromkeys(_address(text) for text in (*_LOOPBACK, *addresses))
        if len(named) > ADDRESSES_MAX:
            raise ConfigurationError(
                f"a certificate names at most {ADDRESSES_MAX} addresses, not {len(named)}"
            )
        key = Ed25519PrivateKey.generate()
        host = f"{node_id}.{DOMAIN}"
        alternatives = [x509.DNSName(host), *map(x509.IPAddress, named)]
        not_before = datetime.datetime.fromtimestamp(now_s - BACKDATED_S, datetime.UTC)
        not_after = datetime.datetime.fromtimestamp(now_s + life_s, datetime.UTC)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(host))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage("digital_signature"), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(_key_id(key), critical=False)
            .add_extension(_issuer_id(self._key), critical=False)
            .sign(self._key, None)
        )
        parts, whole = RENEW_AT_PARTS
        return NodeCertificate(
            node_id=node_id,
            addresses=tuple(map(str, named)),
            not_after_s=now_s + life_s,
            renew_at_s=now_s + life_s * parts // whole,
            ca_pem=self.ca_pem,
            cert_pem=certificate.public_bytes(Encoding.PEM),
            key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        )


def client_context(files: MeshFiles) -> ssl.SSLContext:
    """Return a context that believes this network's servers only, and shows who we are.

    The address or name that is dialled must stand in the server's certificate.

    :raises ConfigurationError: if a file is missing or unusable
    """
    return _context(ssl.PROTOCOL_TLS_CLIENT, files)


def server_context(files: MeshFiles) -> ssl.SSLContext:
    """Return a context that lets in this network's nodes only.

    :raises ConfigurationError: if a file is missing or unusable
    """
    return _context(ssl.PROTOCOL_TLS_SERVER, files)


async def prove_peer(
    files: MeshFiles, host: str, port: int, *, wait_max_s: float = PROOF_WAIT_MAX_S
) -> str:
    """Return the name of the node at this route port, when both sides have proved themselves.

    What is advertised is a hint; this is the proof, and costs one connection. It may be our own
    name. A zone (``fe80::1%eth0``) is dialled, but not looked for in the certificate.

    :raises TransportUnavailable: if nobody answers there in time
    :raises RemoteProtocolError: if who answers has another code or another address, or refuses us;
        says which
    :raises ConfigurationError: if our own files cannot be used
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    context = client_context(files)
    try:
        async with asyncio.timeout(wait_max_s):
            reader, writer = await asyncio.open_connection(
                host, port, ssl=context, server_hostname=host.partition("%")[0]
            )
            try:
                # Said only after it has believed our certificate.
                first = (await reader.readuntil(b"\r\n")).removeprefix(b"INFO ")
                names = writer.get_extra_info("peercert").get("subjectAltName", ())
            finally:
                writer.transport.abort()
        node_id = str(json.loads(first)["server_name"])
        if ("DNS", f"{node_id}.{DOMAIN}") in names:
            return node_id
        raise RemoteProtocolError(f"the node at {where} is not the one that its certificate names")
    except ssl.SSLCertVerificationError as error:
        raise RemoteProtocolError(f"{where} is no node of this network: {_why(error)}") from error
    except ssl.SSLError as error:
        raise RemoteProtocolError(f"{where} {_refusal(error)} ({error.reason})") from error
    except TimeoutError as error:
        raise TransportUnavailable(f"no answer from {where} in {wait_max_s} s") from error
    except (OSError, asyncio.IncompleteReadError) as error:
        raise TransportUnavailable(f"no answer from {where} ({error})") from error
    except (ValueError, LookupError, TypeError, asyncio.LimitOverrunError) as error:
        raise RemoteProtocolError(f"what answers at {where} is no broker") from error


def _why(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in _CLOCK_CODES:
        return f"{error.verify_message}; look at the clocks of both machines"
    if error.verify_code in _ADDRESS_CODES:
        return f"{error.verify_message}; it has changed its address since it started"
    return f"it has another join code ({error.verify_message})"


def _refusal(error: ssl.SSLError) -> str:
    if "ALERT" in (error.reason or ""):
        return "does not let us in: it has another join code, or its clock or ours is far off"
    return "speaks no TLS: it is no route port, or one of an open mesh"


def _context(side: int, files: MeshFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        context.load_verify_locations(files.ca)  # And none of the system's.
        context.load_cert_chain(files.cert, files.key)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the certificates in {files.ca.parent} cannot be used ({error}): start the node"
            " again, it issues itself new ones"
        ) from error
    return context


def _authority(key: Ed25519PrivateKey, name: str) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(name))
        .public_key(key.public_key())
        .serial_number(CA_SERIAL)
        .not_valid_before(CA_NOT_BEFORE)
        .not_valid_after(CA_NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage("key_cert_sign"), critical=True)
        .add_extension(_key_id(key), critical=False)
        .add_extension(_issuer_id(key), critical=False)
        .sign(key, None)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _key_usage(usage: str) -> x509.KeyUsage:
    return x509.KeyUsage(**(_KEY_USAGE | {usage: True}))


def _key_id(key: Ed25519PrivateKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key.public_key())


def _issuer_id(key: Ed25519PrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError as error:
        raise ConfigurationError(f"{text!r} is no address of a machine") from error
    if found.is_unspecified or found.is_multicast:
        raise ConfigurationError(f"{text!r} is no address of one machine")
    return found


def _write_private(path: Path, content: bytes) -> None:
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    fresh.replace(path)
