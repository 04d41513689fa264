"""Every way to log in to a broker, TLS that is verified, and secrets that stay secret."""

from __future__ import annotations

import asyncio
import base64
import binascii
import datetime
import hashlib
import ipaddress
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from coase.protocol.backends.broker import EmbeddedBroker
from coase.protocol.backends.nats import NatsConfig, NatsTransport, Tls
from coase.protocol.backends.nats_config import NkeyLogin
from coase.protocol.errors import CoaseError, ConfigurationError, TransportUnavailable
from tests.conformance.transport_suite import BOB, Mailbox
from tests.protocol.nats_world import bare_server, eventually, impatient

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "s3cret/with@odd:signs"
ENCODED = "s3cret%2Fwith%40odd%3Asigns"


async def carries(config: NatsConfig) -> bool:
    transport = await NatsTransport.connect(config)
    try:
        inbox = Mailbox()
        await transport.listen(BOB, inbox)
        await transport.send(BOB, b"through")
        return await inbox.has(1) == [b"through"]
    finally:
        await transport.close()


# Passwords and tokens


@pytest.mark.anyio
async def test_user_and_password_are_taken_from_the_settings_or_from_the_url(
    tmp_path: Path,
) -> None:
    async with bare_server(
        tmp_path, f'authorization {{ users: [{{ user: "a b", password: "{SECRET}" }}] }}'
    ) as server:
        assert await carries(NatsConfig(urls=(server.url,), user="a b", password=SECRET))
        url = f"nats://a%20b:{ENCODED}@127.0.0.1:{server.port}"
        assert await carries(NatsConfig(urls=(url,)))


@pytest.mark.anyio
async def test_a_token_is_taken_from_the_settings_or_from_the_url(tmp_path: Path) -> None:
    async with bare_server(tmp_path, f'authorization {{ token: "{SECRET}" }}') as server:
        assert await carries(NatsConfig(urls=(server.url,), token=SECRET))
        assert await carries(NatsConfig(urls=(f"nats://{ENCODED}@127.0.0.1:{server.port}",)))


@pytest.mark.anyio
@pytest.mark.parametrize("must_connect", [True, False])
async def test_wrong_credentials_are_a_clear_error_without_the_secret(must_connect: bool) -> None:
    broker = EmbeddedBroker()
    await broker.start()
    for config in (
        NatsConfig(urls=(broker.url,), user="coase", password=SECRET),
        NatsConfig(urls=(broker.url,), token=SECRET),
        NatsConfig(urls=(f"nats://coase:{ENCODED}@127.0.0.1:{broker.port}",)),
        NatsConfig(urls=(broker.url,)),
    ):
        with pytest.raises(ConfigurationError, match="refused the credentials") as caught:
            await NatsTransport.connect(config, must_connect=must_connect)
        assert str(broker.port) in str(caught.value)
        assert SECRET not in str(caught.value)
        assert ENCODED not in str(caught.value)
    await broker.stop()


# Nkeys and JWTs: what NATS' own tools make, made here


class Nkey:
    """A key of the kind U(ser), A(ccount) or O(perator), as ``nk -gen`` makes it."""

    def __init__(self, kind: str, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        prefix = "ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(kind) << 3
        public = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.public = self._text(bytes((prefix,)) + public)
        head = bytes((18 << 3 | prefix >> 5, (prefix & 31) << 3))
        self.seed = self._text(head + seed)

    @staticmethod
    def _text(raw: bytes) -> str:
        raw += binascii.crc_hqx(raw, 0).to_bytes(2, "little")
        return base64.b32encode(raw).decode().rstrip("=")

    def jwt(self, subject: str, kind: str, **claims: Any) -> str:
        body: dict[str, Any] = {
            "iat": 1_700_000_000,
            "iss": self.public,
            "sub": subject,
            "name": kind,
            "nats": {"type": kind, "version": 2, **claims},
        }
        body["jti"] = base64.b32encode(hashlib.sha256(json.dumps(body).encode()).digest()).decode()
        head = {"typ": "JWT", "alg": "ed25519-nkey"}
        text = ".".join(self._base64(json.dumps(part).encode()) for part in (head, body))
        return f"{text}.{self._base64(self._key.sign(text.encode()))}"

    @staticmethod
    def _base64(raw: bytes) -> str:
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")


OPERATOR, ACCOUNT, USER, OTHER = (
    Nkey(kind, bytes((number,)) * 32) for number, kind in enumerate("OAUU", start=1)
)


@pytest.mark.anyio
async def test_an_nkey_signs_the_brokers_nonce(tmp_path: Path) -> None:
    seed_file = tmp_path / "user.nk"
    seed_file.write_text(USER.seed + "\n")
    async with bare_server(
        tmp_path / "server", f"authorization {{ users: [{{ nkey: {USER.public} }}] }}"
    ) as server:
        assert await carries(NatsConfig(urls=(server.url,), nkey_seed=USER.seed))
        assert await carries(NatsConfig(urls=(server.url,), nkey_file=seed_file))
        with pytest.raises(ConfigurationError, match="refused"):
            await NatsTransport.connect(NatsConfig(urls=(server.url,), nkey_seed=OTHER.seed))


@pytest.mark.anyio
async def test_a_creds_file_carries_a_jwt_and_its_key(tmp_path: Path) -> None:
    account = OPERATOR.jwt(
        ACCOUNT.public,
        "account",
        limits={
            **dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1),
            "wildcards": True,
        },
    )
    user = ACCOUNT.jwt(USER.public, "user", subs=-1, data=-1, payload=-1, pub={}, sub={})
    creds = tmp_path / "user.creds"
    creds.write_text(
        f"-----BEGIN NATS USER JWT-----\n{user}\n------END NATS USER JWT------\n\n"
        "************************* IMPORTANT *************************\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{USER.seed}\n------END USER NKEY SEED------\n"
    )
    text = f"""
        operator: {OPERATOR.jwt(OPERATOR.public, "operator")}
        resolver: MEMORY
        resolver_preload: {{ {ACCOUNT.public}: {account} }}
    """
    async with bare_server(tmp_path / "server", text) as server:
        assert await carries(NatsConfig(urls=(server.url,), creds_file=creds))
        creds.write_text(creds.read_text().replace(USER.seed, OTHER.seed))
        with pytest.raises(ConfigurationError, match="refused"):
            await NatsTransport.connect(NatsConfig(urls=(server.url,), creds_file=creds))


def test_a_damaged_seed_is_an_error_that_does_not_show_it() -> None:
    damaged = USER.seed[:-1] + ("A" if USER.seed[-1] != "A" else "B")
    for seed in (damaged, USER.public, "no base32 at all!", "SU", USER.seed[:-8]):
        with pytest.raises(ConfigurationError) as caught:
            NkeyLogin.of_seed(seed)
        assert seed not in str(caught.value)
    assert NkeyLogin.of_seed(USER.seed).public == USER.public


# TLS


@dataclass
class Authority:
    """A certificate authority made for one test."""

    directory: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls, directory: Path) -> Authority:
        directory.mkdir(parents=True)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate("Coase test authority", key.public_key(), None, key)
        (directory / "ca.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
        return cls(directory, key, certificate)

    @property
    def file(self) -> Path:
        return self.directory / "ca.pem"

    def issue(self, name: str, *hosts: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(name, key.public_key(), self.certificate, self.key, *hosts)
        cert_file, key_file = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        cert_file.write_bytes(certificate.public_bytes(Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return cert_file, key_file

    def server(self, *hosts: str, verify: bool = False) -> str:
        cert_file, key_file = self.issue("server", *hosts)
        return f"""tls {{
            cert_file: "{cert_file}", key_file: "{key_file}",
            ca_file: "{self.file}", verify: {str(verify).lower()}, timeout: 5
        }}"""


def _certificate(
    name: str,
    public: ec.EllipticCurvePublicKey,
    issuer: x509.Certificate | None,
    signer: ec.EllipticCurvePrivateKey,
    *hosts: str,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if issuer is None:
        usage = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        builder = builder.add_extension(usage, critical=True)
    if hosts:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_name(host) for host in hosts]), critical=False
        )
    return builder.sign(signer, hashes.SHA256())


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


@pytest.mark.anyio
async def test_tls_with_an_authority_of_our_own(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ca")
    async with bare_server(tmp_path / "server", authority.server("127.0.0.1")) as server:
        for url in (server.url, server.url.replace("nats:", "tls:")):
            assert await carries(NatsConfig(urls=(url,), tls=Tls(ca_file=authority.file)))


@pytest.mark.anyio
async def test_a_certificate_that_is_not_to_be_believed_is_refused(tmp_path: Path) -> None:
    authority, stranger = Authority.make(tmp_path / "ca"), Authority.make(tmp_path / "other")
    async with bare_server(tmp_path / "server", authority.server("broker.example")) as server:
        for tls in (None, Tls(ca_file=stranger.file), Tls(ca_file=authority.file)):
            config = NatsConfig(urls=(server.url,), tls=tls)
            with pytest.raises(ConfigurationError, match="certificate"):
                await NatsTransport.connect(config)
        named = Tls(ca_file=authority.file, hostname="broker.example")
        assert await carries(NatsConfig(urls=(server.url,), tls=named))


@pytest.mark.anyio
async def test_a_broker_may_ask_for_our_certificate(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ca")
    cert_file, key_file = authority.issue("client")
    text = authority.server("127.0.0.1", verify=True)
    async with bare_server(tmp_path / "server", text) as server:
        tls = Tls(ca_file=authority.file, cert_file=cert_file, key_file=key_file)
        assert await carries(NatsConfig(urls=(server.url,), tls=tls))
        bare = impatient(NatsConfig(urls=(server.url,), tls=Tls(ca_file=authority.file)))
        with pytest.raises((TransportUnavailable, ConfigurationError)):
            await NatsTransport.connect(bare)


@pytest.mark.anyio
@pytest.mark.parametrize("scheme", ["nats", "tls"])
async def test_where_tls_is_wanted_no_password_is_said_in_clear(scheme: str) -> None:
    heard = bytearray()

    async def listen_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"max_payload":1048576,"auth_required":true}\r\n')
        while some := await reader.read(4096):
            heard.extend(some)
        writer.close()

    async with await asyncio.start_server(listen_in, "127.0.0.1", 0) as server:
        url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        config = NatsConfig(
            urls=(url,), user="me", password=SECRET, tls=Tls() if scheme == "nats" else None
        )
        with pytest.raises(TransportUnavailable, match="TLS is wanted"):
            await NatsTransport.connect(impatient(config))
    assert b"CONNECT" not in heard


def test_unusable_tls_files_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    with pytest.raises(ConfigurationError, match=r"missing\.pem"):
        Tls(ca_file=missing).context()
    missing.write_text("no certificate")
    with pytest.raises(ConfigurationError, match=r"missing\.pem"):
        Tls(ca_file=missing).context()


# Secrets


def test_a_configuration_shows_no_secret() -> None:
    shown = repr(
        [
            NatsConfig(password=SECRET, user="me"),
            NatsConfig(token=SECRET),
            NatsConfig(nkey_seed=SECRET),
            NatsConfig(urls=(f"nats://me:{ENCODED}@h:1", f"tls://{ENCODED}@h:2")),
            NatsConfig(urls=(f"me:{ENCODED}@h:1",)),
            NatsConfig(urls=(f"nats://me:{ENCODED}@h:1",)).servers(),
            NkeyLogin.of_seed(USER.seed, jwt=SECRET),
        ]
    )
    assert SECRET not in shown
    assert ENCODED not in shown
    assert USER.seed not in shown
    assert "nats://***@h:1" in shown


@pytest.mark.parametrize(
    "url",
    ["", "http://h", "nats://", f"nats://me:{SECRET}@h:port", f"me:{SECRET}@h", "nats://h:99999"],
)
def test_an_address_that_is_none_is_refused_without_showing_a_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        NatsConfig(urls=(url,))
    trail: BaseException | None = caught.value
    while trail is not None:
        assert "s3cret" not in str(trail)
        trail = None if trail.__suppress_context__ else trail.__context__


def test_two_kinds_of_credentials_or_no_address_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="one kind"):
        NatsConfig(user="me", password="x", token="y")
    with pytest.raises(ConfigurationError, match="no address"):
        NatsConfig(urls=())
    with pytest.raises(ConfigurationError, match="network"):
        NatsConfig(net="a.b")


@pytest.mark.anyio
async def test_errors_health_and_logs_show_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    broker = EmbeddedBroker()
    await broker.start()
    password = broker.client_config().password
    transport = await NatsTransport.connect(
        impatient(NatsConfig(urls=(f"nats://coase:{password}@127.0.0.1:{broker.port}",)))
    )
    await broker.stop()
    await eventually(lambda: "is away" in caplog.text)
    shown = [repr(transport), repr(transport.health()), caplog.text]
    await transport.close()
    with pytest.raises(CoaseError) as caught:
        await NatsTransport.connect(
            impatient(NatsConfig(urls=(f"nats://coase:{password}@127.0.0.1:{broker.port}",)))
        )
    shown += [repr(caught.value), repr(broker), repr(broker.client_config())]
    assert password not in "".join(shown)
