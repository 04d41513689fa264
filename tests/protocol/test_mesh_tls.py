"""Certificates of a mesh: one authority for all who have the code, and for nobody else."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import ssl
import stat
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from coase.protocol.backends.mesh_tls import (
    ADDRESSES_MAX,
    BACKDATED_S,
    LIFE_S,
    MeshAuthority,
    MeshFiles,
    client_context,
    prove_peer,
    server_context,
)
from coase.protocol.errors import ConfigurationError, RemoteProtocolError, TransportUnavailable
from coase.protocol.joincode import JoinCode
from tests.vectors.make import HERE, LAN_SECRET

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

CODE = JoinCode.of(b"sixteen secrets!")
OTHER = JoinCode.of(b"another sixteen!")
DAY_S = 86_400
NOW_S = 1_800_000_000


def files_of(
    directory: Path,
    code: JoinCode = CODE,
    *,
    node_id: str = "node",
    addresses: Iterable[str] = (),
    issued_s: int | None = None,
    life_s: int = LIFE_S,
) -> MeshFiles:
    now_s = int(time.time()) if issued_s is None else issued_s
    issued = MeshAuthority(code).issue(node_id, addresses, now_s=now_s, life_s=life_s)
    return issued.write(directory)


# The authority


def test_it_is_the_same_bytes_on_every_node() -> None:
    here = MeshAuthority(JoinCode.parse(CODE.text)).ca_pem
    assert here == MeshAuthority(CODE).ca_pem
    program = """
import sys
from coase.protocol.backends.mesh_tls import MeshAuthority
from coase.protocol.joincode import JoinCode
sys.stdout.write(MeshAuthority(JoinCode.parse(sys.stdin.read())).ca_pem.decode())
"""
    there = subprocess.run(
        [sys.executable, "-c", program], input=CODE.text.encode(), capture_output=True, check=True
    )
    assert there.stdout == here
    assert MeshAuthority(OTHER).ca_pem != here


def test_it_is_that_of_the_vector() -> None:
    vector = json.loads((HERE / "lan.json").read_text(encoding="utf-8"))
    assert MeshAuthority(JoinCode.of(LAN_SECRET)).ca_pem.decode() == vector["ca_certificate"]


def test_it_may_sign_nodes_and_nothing_further() -> None:
    certificate = x509.load_pem_x509_certificate(MeshAuthority(CODE).ca_pem)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.path_length) == (True, 0)
    certificate.verify_directly_issued_by(certificate)


# A node's certificate


def test_a_node_gets_one_for_its_name_and_each_of_its_addresses() -> None:
    addresses = ["10.1.2.3", "fd00::7", "FD00:0::7", "fe80::1%eth0", "127.0.0.1"]
    issued = MeshAuthority(CODE).issue("node-7", addresses, now_s=NOW_S)
    assert issued.addresses == ("127.0.0.1", "::1", "10.1.2.3", "fd00::7", "fe80::1")
    certificate = x509.load_pem_x509_certificate(issued.cert_pem)
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(issued.ca_pem))
    named = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert named.get_values_for_type(x509.DNSName) == ["node-7.coase"]
    assert named.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(address) for address in issued.addresses
    ]
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_it_bears_clocks_that_are_off_and_is_renewed_long_before_its_end() -> None:
    issued = MeshAuthority(CODE).issue("node", [], now_s=NOW_S)
    certificate = x509.load_pem_x509_certificate(issued.cert_pem)
    assert certificate.not_valid_before_utc.timestamp() == NOW_S - BACKDATED_S
    assert certificate.not_valid_after_utc.timestamp() == issued.not_after_s == NOW_S + LIFE_S
    assert NOW_S + 9 * DAY_S < issued.renew_at_s < issued.not_after_s - 19 * DAY_S


def test_each_is_for_a_fresh_key() -> None:
    one, other = (MeshAuthority(CODE).issue("node", [], now_s=NOW_S) for _ in range(2))
    assert one.key_pem != other.key_pem
    assert one.cert_pem != other.cert_pem


@pytest.mark.parametrize("node_id", ["", "-a", "a-", "A", "a.b", "a" * 33, "a\n", "*"])
def test_a_name_that_is_none_is_refused(node_id: str) -> None:
    with pytest.raises(ConfigurationError, match="no name of a node"):
        MeshAuthority(CODE).issue(node_id, [], now_s=NOW_S)


@pytest.mark.parametrize("address", ["", "host", "10.0.0", "10.0.0.1:80", "::", "ff02::1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match="is no address of"):
        MeshAuthority(CODE).issue("node", [address], now_s=NOW_S)


def test_addresses_have_a_limit() -> None:
    addresses = [f"10.0.0.{number}" for number in range(ADDRESSES_MAX - 2)]
    assert len(MeshAuthority(CODE).issue("node", addresses, now_s=NOW_S).addresses) == ADDRESSES_MAX
    with pytest.raises(ConfigurationError, match=f"at most {ADDRESSES_MAX}"):
        MeshAuthority(CODE).issue("node", [*addresses, "10.0.1.1"], now_s=NOW_S)


# The files


def test_only_this_user_can_read_the_files_and_the_code_is_in_none(tmp_path: Path) -> None:
    directory = tmp_path / "tls"
    authority = MeshAuthority(CODE)
    files = authority.issue("node", [], now_s=NOW_S).write(directory)
    assert files == MeshFiles.of(directory)
    assert {path.name for path in directory.iterdir()} == {"ca.pem", "node.pem", "node.key"}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    kept = b""
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        kept += path.read_bytes()
    ca_key = authority._key.private_bytes_raw()
    der = ssl.PEM_cert_to_DER_cert(files.cert.read_text()) + ssl.PEM_cert_to_DER_cert(
        files.ca.read_text()
    )
    for secret in (CODE.secret_bytes, CODE.ca_seed, ca_key):
        assert secret not in kept + der
        assert secret.hex().encode() not in kept
    assert CODE.text.encode() not in kept
    assert kept.count(b"PRIVATE KEY-----") == 2  # The node's, beginning and end.


def test_writing_again_replaces_them_and_leaves_nothing_else(tmp_path: Path) -> None:
    first = files_of(tmp_path).cert.read_bytes()
    assert files_of(tmp_path).cert.read_bytes() != first
    assert len(list(tmp_path.iterdir())) == 3
    server_context(MeshFiles.of(tmp_path))  # Certificate and key fit.


def test_nothing_secret_is_shown_by_accident() -> None:
    authority = MeshAuthority(CODE)
    issued = authority.issue("node", [], now_s=NOW_S)
    shown = repr((authority, issued))
    assert "PRIVATE" not in shown
    assert CODE.net in shown


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=str(tmp_path / "file" / "tls")):
        files_of(tmp_path / "file" / "tls")


def test_missing_and_damaged_files_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="start the node again"):
        client_context(MeshFiles.of(tmp_path))
    files = files_of(tmp_path)
    files.key.write_bytes(files_of(tmp_path / "other").key.read_bytes())
    with pytest.raises(ConfigurationError, match="start the node again"):
        server_context(files)


# Handshakes


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str = "127.0.0.1") -> str:
    """Shake hands in memory; return the version, or raise what either side objects to."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server, server_hostname=name)
    other = server.wrap_bio(to_server, to_client, server_side=True)
    done: set[ssl.SSLObject] = set()
    for _ in range(10):
        for side in (one, other):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass
        if len(done) == 2:
            return other.version() or ""
    raise AssertionError("the handshake does not end")


def test_two_nodes_of_one_code_believe_each_other(tmp_path: Path) -> None:
    one, other = files_of(tmp_path / "one"), files_of(tmp_path / "other", addresses=["fd00::7"])
    for name in ("127.0.0.1", "::1", "fd00::7", "node.coase"):
        assert handshake(client_context(one), server_context(other), name) == "TLSv1.3"


def test_an_address_that_is_not_the_servers_is_noticed(tmp_path: Path) -> None:
    files = files_of(tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError, match="address"):
        handshake(client_context(files), server_context(files), "10.1.2.3")


def test_another_code_is_refused_by_both_sides(tmp_path: Path) -> None:
    ours, theirs = files_of(tmp_path / "ours"), files_of(tmp_path / "theirs", OTHER)
    for client, server in ((ours, theirs), (theirs, ours)):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(client_context(client), server_context(server))
        careless = client_context(client)
        careless.check_hostname = False
        careless.verify_mode = ssl.CERT_NONE  # Believes anybody, and is not believed.
        with pytest.raises(ssl.SSLError, match=r"(?i)verify failed"):
            handshake(careless, server_context(server))


def test_who_shows_no_certificate_is_refused(tmp_path: Path) -> None:
    files = files_of(tmp_path)
    silent = ssl.create_default_context(cafile=files.ca)
    with pytest.raises(ssl.SSLError, match=r"(?i)did not return a certificate"):
        handshake(silent, server_context(files))


@pytest.mark.parametrize("days", [-40, 3])
def test_out_of_its_time_it_is_refused_by_both_sides(tmp_path: Path, days: int) -> None:
    now = files_of(tmp_path / "now")
    issued_s = int(time.time()) + days * DAY_S
    then = files_of(tmp_path / "then", issued_s=issued_s)
    for client, server in ((now, then), (then, now)):
        with pytest.raises(ssl.SSLCertVerificationError, match=r"expired|not yet valid"):
            handshake(client_context(client), server_context(server))


@pytest.mark.parametrize("minutes", [-10, 10, 20 * 60, -20 * 60])
def test_clocks_that_are_somewhat_off_do_no_harm(tmp_path: Path, minutes: int) -> None:
    issued_s = int(time.time()) + minutes * 60
    now, then = files_of(tmp_path / "now"), files_of(tmp_path / "then", issued_s=issued_s)
    assert handshake(client_context(now), server_context(then)) == "TLSv1.3"
    assert handshake(client_context(then), server_context(now)) == "TLSv1.3"


def test_a_node_can_sign_no_other(tmp_path: Path) -> None:
    """A certificate that a member's node key signed is believed by nobody."""
    member, victim = files_of(tmp_path / "member"), files_of(tmp_path / "victim")
    authority = MeshAuthority(OTHER)
    key = load_pem_private_key(member.key.read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    authority._key = key
    authority._certificate = x509.load_pem_x509_certificate(member.cert.read_bytes())
    forged = authority.issue("forged", [], now_s=int(time.time())).write(tmp_path / "forged")
    forged.cert.write_bytes(forged.cert.read_bytes() + member.cert.read_bytes())  # The chain.
    forged.ca.write_bytes(victim.ca.read_bytes())
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client_context(victim), server_context(forged))


# The proof of a peer


@asynccontextmanager
async def answering(files: MeshFiles | None, says: bytes) -> AsyncIterator[int]:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        writer.close()

    context = server_context(files) if files else None
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def refusal(files: MeshFiles, port: int) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        await prove_peer(files, "127.0.0.1", port)
    assert f"127.0.0.1:{port}" in str(caught.value)
    return str(caught.value)


@pytest.mark.anyio
async def test_a_peer_proves_its_name(tmp_path: Path) -> None:
    ours, theirs = files_of(tmp_path / "a", node_id="a"), files_of(tmp_path / "b", node_id="b")
    async with answering(theirs, b'INFO {"server_name":"b"}\r\n') as port:
        assert await prove_peer(ours, "127.0.0.1", port) == "b"
    async with answering(theirs, b'INFO {"server_name":"c"}\r\n') as port:
        assert "not the one that its certificate names" in await refusal(ours, port)


@pytest.mark.anyio
@pytest.mark.parametrize("says", [b"\r\n", b"INFO {}\r\n", b"INFO []\r\n", b"x" * 70_000 + b"\r\n"])
async def test_a_member_that_talks_nonsense_is_no_peer(tmp_path: Path, says: bytes) -> None:
    files = files_of(tmp_path)
    async with answering(files, says) as port:
        assert "is no broker" in await refusal(files, port)


@pytest.mark.anyio
async def test_it_says_what_is_wrong_with_who_answers(tmp_path: Path) -> None:
    ours, theirs = files_of(tmp_path / "ours"), files_of(tmp_path / "theirs", OTHER)
    old = files_of(tmp_path / "old", issued_s=int(time.time()) - 40 * DAY_S)
    async with answering(theirs, b"") as port:
        assert "another join code" in await refusal(ours, port)
    async with answering(old, b"") as port:
        assert "look at the clocks" in await refusal(ours, port)
    async with answering(None, b"INFO {}\r\n") as port:
        assert "speaks no TLS" in await refusal(ours, port)


@pytest.mark.anyio
async def test_who_is_not_there_or_says_nothing_is_told_from_who_is_wrong(tmp_path: Path) -> None:
    files = files_of(tmp_path)
    with socket.socket() as quiet:
        quiet.bind(("127.0.0.1", 0))
        port = quiet.getsockname()[1]
        with pytest.raises(TransportUnavailable, match="no answer"):
            await prove_peer(files, "127.0.0.1", port)
        quiet.listen()
        with pytest.raises(TransportUnavailable, match=r"in 0\.05 s"):
            await prove_peer(files, "127.0.0.1", port, wait_max_s=0.05)
    async with answering(files, b"") as port:
        with pytest.raises(TransportUnavailable, match="no answer"):
            await prove_peer(files, "127.0.0.1", port)
