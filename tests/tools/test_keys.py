"""``coase keys``: what is made, taken in and given out, and what is refused without a trace."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from eth_account import Account

from coase.agents.config import NatsAddress, Network, save_network
from coase.agents.wiring import unlock_keys
from coase.escrow.backends import keystore
from coase.protocol.errors import ConfigurationError
from coase.protocol.identity import Identity
from tests.tools.commands import Home

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eth_account.signers.local import LocalAccount

SECRET = "7c" * 32
ADDRESS = Identity(bytes.fromhex(SECRET)).address
SEPOLIA, ETHEREUM = 11_155_111, 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a guess is not what is tested here."""
    monkeypatch.setattr(keystore, "SCRYPT_N", 2**10)
    monkeypatch.delenv("COASE_PASSPHRASE_FILE", raising=False)


def home_on(tmp_path: Path, chain_id: int, *, faucet: bool = False) -> Home:
    """A user whose network file names a chain; nothing runs there."""
    home = Home(tmp_path / "home")
    address = "0x" + "1" * 40
    network = Network(
        nats=NatsAddress(url="nats://127.0.0.1:1"),
        rpc="http://127.0.0.1:1",
        chain_id=chain_id,
        token=address,
        factory=address,
        escrow=address,
        faucet=faucet,
    )
    save_network(network, home.path / "network.json")
    return home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return home_on(tmp_path, 31337, faucet=True)


@contextmanager
def phrases(*texts: str) -> Iterator[list[str]]:
    """Open descriptors that hold pass phrases, as a shell's redirection gives them."""
    found = []
    for text in texts:
        reader, writer = os.pipe()
        os.write(writer, text.encode() + b"\n")
        os.close(writer)
        found.append(reader)
    try:
        yield [str(fd) for fd in found]
    finally:
        for fd in found:
            os.close(fd)


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a directory, but for the marks of who held it."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != "lock"
    }


# ---- made, listed, given out -------------------------------------------------------------------


def test_a_new_key_is_the_one_that_the_agent_will_have(home: Home) -> None:
    made = home.json("keys", "new", "oracle")
    assert made["node"] == "oracle"
    place = Path(made["state"])
    assert unlock_keys(_network(home), place).derive("oracle").address == made["address"]
    assert [key["address"] for key in home.json("keys", "list")] == [made["address"]]
    assert home.json("keys", "list", "--state", str(place)) == home.json("keys", "list")
    for file in (file for file in place.rglob("*") if file.name != "lock"):
        assert file.stat().st_mode & 0o077 == 0, file
    shown = home.call("keys", "list").stdout
    assert "oracle" in shown
    assert made["address"] in shown


def _network(home: Home) -> Network:
    return Network.model_validate_json((home.path / "network.json").read_text())


def test_a_key_that_exists_is_left_alone(home: Home) -> None:
    made = home.json("keys", "new", "oracle")
    before = tree(home.path)
    again = home.call("keys", "new", "oracle", code=2)
    assert made["address"] in again.stderr
    raw = home.call("keys", "import", "oracle", "--raw", stdin=SECRET.encode(), code=2)
    assert "nothing was changed" in raw.stderr
    assert tree(home.path) == before


def test_nothing_yet(home: Home) -> None:
    assert home.json("keys", "list") == []
    assert "no keys yet" in home.call("keys", "list").stdout
    assert "coase keys list" in home.call("keys", "export", "oracle", code=2).stderr


@pytest.mark.parametrize("name", ["../up", "a/b", "", "x" * 65, ".hidden"])
def test_a_name_that_is_none(home: Home, name: str) -> None:
    before = tree(home.path)
    assert "no name for a key" in home.call("keys", "new", name, code=2).stderr
    assert tree(home.path) == before


def test_other_wallets_read_what_is_exported_and_it_comes_back(home: Home, tmp_path: Path) -> None:
    made = home.json("keys", "new", "oracle")
    file = tmp_path / "oracle.json"
    with phrases("far away") as (fd,):
        home.call("keys", "export", "oracle", "--out", str(file), "--file-passphrase-fd", fd)
    assert file.stat().st_mode & 0o777 == 0o600
    secret = Account.decrypt(file.read_text(), "far away")
    assert Account.from_key(secret).address.lower() == made["address"]
    with phrases("far away", "again") as (good, again):
        denied = home.call(
            "keys", "export", "oracle", "--out", str(file), "--file-passphrase-fd", again, code=2
        )
        assert "exists already" in denied.stderr
        taken = home.json("keys", "import", "copy", str(file), "--file-passphrase-fd", good)
    assert taken["address"] == made["address"]
    assert taken["imported"]


def test_a_key_of_another_wallet_becomes_the_agents(home: Home, tmp_path: Path) -> None:
    foreign: LocalAccount = Account.create()
    file = tmp_path / "UTC--key"
    content = Account.encrypt(foreign.key, "theirs", kdf="pbkdf2", iterations=1000)
    file.write_text(json.dumps(content))
    file.chmod(0o600)
    with phrases("theirs") as (fd,):
        taken = home.json("keys", "import", "oracle", str(file), "--file-passphrase-fd", fd)
    assert taken["address"] == foreign.address.lower()
    ring = unlock_keys(_network(home), Path(taken["state"]))
    assert ring.derive("oracle").address == taken["address"]
    assert ring.derive("other").address != taken["address"]
    assert bytes(foreign.key).hex() not in "".join(map(repr, tree(home.path).values()))


def _bad_files() -> dict[str, tuple[Any, str]]:
    good = Account.encrypt(bytes.fromhex(SECRET), "right", kdf="pbkdf2", iterations=1000)
    crypto = good["crypto"]
    greedy = {**crypto, "kdf": "scrypt", "kdfparams": {"n": 2**30, "r": 8, "p": 1, "dklen": 32}}
    return {
        "phrase": (good, "does not open"),
        "garbage": ("garbage", "is no key file"),
        "list": ([], "is no key file"),
        "version": ({**good, "version": 4}, "of version 4"),
        "greedy": ({**good, "crypto": greedy}, "more work than any wallet"),
        "address": ({**good, "address": "00" * 20}, "says that it holds"),
        "cut": ({**good, "crypto": {**crypto, "ciphertext": "00"}}, "does not open"),
        "mac": ({**good, "crypto": {k: v for k, v in crypto.items() if k != "mac"}}, "keystore"),
    }


@pytest.mark.parametrize("case", _bad_files())
def test_a_file_that_cannot_be_opened_leaves_nothing_behind(
    home: Home, tmp_path: Path, case: str
) -> None:
    content, said = _bad_files()[case]
    file = tmp_path / "key.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    file.chmod(0o600)
    before = tree(home.path)
    with phrases("wrong" if case == "phrase" else "right") as (fd,):
        done = home.call("keys", "import", "a", str(file), "--file-passphrase-fd", fd, code=2)
    assert said in done.stderr
    assert tree(home.path) == before


def test_a_file_that_others_read_and_one_that_is_not_there(home: Home, tmp_path: Path) -> None:
    file = tmp_path / "key.json"
    assert "does not exist" in home.call("keys", "import", "a", str(file), code=2).stderr
    file.write_text(json.dumps(Account.encrypt(bytes.fromhex(SECRET), "x", iterations=2)))
    file.chmod(0o644)
    assert f"chmod 600 {file}" in home.call("keys", "import", "a", str(file), code=2).stderr


# ---- raw keys ----------------------------------------------------------------------------------


def test_a_raw_key_is_good_on_a_local_chain_only(tmp_path: Path) -> None:
    home = home_on(tmp_path / "local", 31337, faucet=True)
    taken = home.call("keys", "import", "a", "--raw", stdin=f"0x{SECRET}\n".encode())
    assert ADDRESS in taken.stdout
    assert "never use it" not in taken.stderr
    assert home.call("keys", "export", "a", "--raw").stdout == SECRET + "\n"

    home = home_on(tmp_path / "test", SEPOLIA)
    with phrases("mine") as (fd,):
        warned = home.call(
            "keys", "import", "a", "--raw", "--passphrase-fd", fd, stdin=SECRET.encode()
        )
    assert "never use it" in warned.stderr

    home = home_on(tmp_path / "main", ETHEREUM)
    before = tree(home.path)
    refused = home.call("keys", "import", "a", "--raw", stdin=SECRET.encode(), code=2)
    assert "Ethereum (1) is a main chain" in refused.stderr
    assert tree(home.path) == before
    with phrases("mine", "mine") as (one, two):
        home.call("keys", "new", "a", "--passphrase-fd", one)
        out = home.call("keys", "export", "a", "--raw", "--passphrase-fd", two, code=2)
    assert out.stdout == ""


def test_where_the_chain_is_not_known_it_counts_as_a_main_one(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    place = str(tmp_path / "node")
    assert "coase up" in home.call("keys", "new", "a", code=2).stderr
    done = home.call("keys", "import", "a", "--raw", "--state", place, stdin=b"x", code=2)
    assert "it is not known on which chain" in done.stderr
    done = home.call("keys", "new", "a", "--state", place, code=2)
    assert "COASE_PASSPHRASE_FILE" in done.stderr


@pytest.mark.parametrize("text", ["", "zz" * 32, "ab" * 31, "00" * 32])
def test_a_raw_key_that_is_none_is_not_repeated(home: Home, text: str) -> None:
    done = home.call("keys", "import", "a", "--raw", stdin=text.encode(), code=2)
    assert not text or text not in done.stderr
    assert home.json("keys", "list") == []


def test_one_way_to_give_a_key(home: Home) -> None:
    assert "--raw" in home.call("keys", "import", "a", code=2).stderr
    assert "--raw" in home.call("keys", "import", "a", "file", "--raw", code=2).stderr


# ---- pass phrases ------------------------------------------------------------------------------


def test_on_a_main_chain_the_pass_phrase_is_the_owners(tmp_path: Path) -> None:
    home = home_on(tmp_path, ETHEREUM)
    with phrases("correct horse") as (fd,):
        made = home.json("keys", "new", "a", "--passphrase-fd", fd)
    assert not (Path(made["state"]) / keystore.PHRASE_FILE).exists()
    file = tmp_path / "phrase"
    file.write_text("correct horse\n")
    file.chmod(0o600)
    home.environment["COASE_PASSPHRASE_FILE"] = str(file)
    with phrases("out") as (fd,):
        home.call("keys", "export", "a", "--file-passphrase-fd", fd)
    file.chmod(0o640)
    with phrases("out") as (fd,):
        done = home.call("keys", "export", "a", "--file-passphrase-fd", fd, code=2)
    assert f"chmod 600 {file}" in done.stderr
    file.unlink()
    with phrases("out") as (fd,):
        done = home.call("keys", "export", "a", "--file-passphrase-fd", fd, code=2)
    assert "cannot be read" in done.stderr


def test_a_wrong_pass_phrase_changes_nothing(tmp_path: Path) -> None:
    home = home_on(tmp_path, ETHEREUM)
    with phrases("right") as (fd,):
        home.call("keys", "new", "a", "--passphrase-fd", fd)
    place = home.json("keys", "list")[0]["state"]
    before = tree(home.path)
    for text, said in (("wrong", "does not open"), ("", "no pass phrase"), ("x" * 2000, "1024")):
        with phrases(text) as (fd,):
            done = home.call("keys", "new", "b", "--state", place, "--passphrase-fd", fd, code=2)
        assert said in done.stderr
    done = home.call("keys", "new", "b", "--state", place, "--passphrase-fd", "987", code=2)
    assert "987< FILE" in done.stderr
    assert tree(home.path) == before


def test_a_place_that_runs_keeps_its_keys(home: Home) -> None:
    from coase.agents.backends.sqlite import StateDirectory

    made = home.json("keys", "new", "a")
    held = StateDirectory(Path(made["state"]))
    try:
        done = home.call("keys", "new", "b", "--state", made["state"], code=2)
    finally:
        held.release()
    assert f"process {os.getpid()}" in done.stderr


def test_a_damaged_list_is_named_and_kept(home: Home) -> None:
    made = home.json("keys", "new", "a")
    path = Path(made["state"]) / keystore.NAMES_FILE
    path.write_text('{"a": "0x12"}')
    assert f"{path} is damaged" in home.call("keys", "list", code=2).stderr
    path.write_text(json.dumps({"a": made["address"]}))
    path.chmod(0o666)
    assert f"chmod 600 {path}" in home.call("keys", "list", code=2).stderr


class FakeKeyring(ModuleType):
    """What the package keyring looks like from here."""

    def __init__(self) -> None:
        super().__init__("keyring")
        self.kept: dict[tuple[str, str], str] = {}
        self.errors = ModuleType("keyring.errors")
        self.errors.KeyringError = RuntimeError  # type: ignore[attr-defined]

    def get_password(self, service: str, name: str) -> str | None:
        return self.kept.get((service, name))

    def set_password(self, service: str, name: str, phrase: str) -> None:
        self.kept[service, name] = phrase


def test_the_systems_keyring_holds_the_pass_phrase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, fake = home_on(tmp_path, ETHEREUM), FakeKeyring()
    monkeypatch.setitem(sys.modules, "keyring", None)
    assert "pip install keyring" in home.call("keys", "new", "a", "--keyring", code=2).stderr
    monkeypatch.setitem(sys.modules, "keyring", fake)
    monkeypatch.setitem(sys.modules, "keyring.errors", fake.errors)
    made = home.json("keys", "new", "a", "--keyring")
    assert [name for _, name in fake.kept] == [made["state"]]
    ring = unlock_keys(_network(home), Path(made["state"]))
    assert ring.derive("a").address == made["address"]
    fake.kept.clear()
    with pytest.raises(ConfigurationError, match="pass phrase of yours"):
        unlock_keys(_network(home), Path(made["state"]))
    lost = home.call("keys", "export", "a", "--raw", "--keyring", code=2)
    assert lost.stdout == ""
