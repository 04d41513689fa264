"""The node's seed is made once, opens again, and is kept from everybody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from eth_account import Account

from coase.escrow.backends import keystore
from coase.escrow.backends.keystore import (
    KEY_FILE,
    PHRASE_FILE,
    change_passphrase,
    identity_from_hex,
    open_keystore,
)
from coase.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

FAST = 2**10  # The cost of a guess is not what is tested here.


def test_it_is_made_once_and_opens_again(tmp_path: Path) -> None:
    node = tmp_path / "state" / "node"
    seed = open_keystore(node)
    assert open_keystore(node).address == seed.address
    assert seed.derive("anna").address == open_keystore(node).derive("anna").address
    assert seed.derive("anna").address != seed.derive("bert").address
    assert open_keystore(tmp_path / "other").address != seed.address


def test_nobody_else_can_read_what_it_writes(tmp_path: Path) -> None:
    open_keystore(tmp_path / "node")
    assert (tmp_path / "node").stat().st_mode & 0o777 == 0o700
    names = sorted(path.name for path in (tmp_path / "node").iterdir())
    assert names == [KEY_FILE, PHRASE_FILE]
    for name in names:
        assert (tmp_path / "node" / name).stat().st_mode & 0o777 == 0o600


def test_the_file_holds_no_secret_in_plain_and_any_wallet_opens_it(tmp_path: Path) -> None:
    seed = open_keystore(tmp_path, passphrase="correct horse", scrypt_n=FAST)
    content = (tmp_path / KEY_FILE).read_text()
    assert seed.secret_for_keystore().hex() not in content
    assert json.loads(content)["crypto"]["kdf"] == "scrypt"
    assert not (tmp_path / PHRASE_FILE).exists()
    assert bytes(Account.decrypt(content, "correct horse")) == seed.secret_for_keystore()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
@pytest.mark.parametrize("name", [KEY_FILE, PHRASE_FILE])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    open_keystore(tmp_path)
    (tmp_path / name).chmod(mode)
    with pytest.raises(ConfigurationError, match=f"chmod 600 .*{name}"):
        open_keystore(tmp_path)


def test_a_wrong_pass_phrase_is_named_as_such(tmp_path: Path) -> None:
    open_keystore(tmp_path, passphrase="right", scrypt_n=FAST)
    with pytest.raises(ConfigurationError, match="does not open"):
        open_keystore(tmp_path, passphrase="wrong", scrypt_n=FAST)
    with pytest.raises(ConfigurationError, match="needs its pass phrase"):
        open_keystore(tmp_path)
    with pytest.raises(ConfigurationError, match="is empty"):
        open_keystore(tmp_path, passphrase="")
    assert not (tmp_path / PHRASE_FILE).exists()


def test_a_lost_random_phrase_is_not_made_up_anew(tmp_path: Path) -> None:
    open_keystore(tmp_path)
    (tmp_path / PHRASE_FILE).unlink()
    with pytest.raises(ConfigurationError, match=r"put node\.passphrase back"):
        open_keystore(tmp_path)
    assert not (tmp_path / PHRASE_FILE).exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json", '{"version": 3}', "{" * 20_000])
def test_a_damaged_file_is_an_error_and_stays_as_it_is(tmp_path: Path, content: str) -> None:
    open_keystore(tmp_path)
    (tmp_path / KEY_FILE).write_text(content)
    with pytest.raises(ConfigurationError):
        open_keystore(tmp_path)
    assert (tmp_path / KEY_FILE).read_text() == content


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    open_keystore(tmp_path / "real")
    (tmp_path / "node").mkdir(mode=0o700)
    (tmp_path / "node" / KEY_FILE).symlink_to(tmp_path / "real" / KEY_FILE)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        open_keystore(tmp_path / "node")


def test_a_phrase_without_its_keystore_is_used_for_the_new_one(tmp_path: Path) -> None:
    open_keystore(tmp_path)
    phrase = (tmp_path / PHRASE_FILE).read_text()
    (tmp_path / KEY_FILE).unlink()
    open_keystore(tmp_path)
    assert (tmp_path / PHRASE_FILE).read_text() == phrase


def test_processes_that_make_it_at_once_end_with_one(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.stdin.read(1);"
        "from coase.escrow.backends.keystore import open_keystore;"
        f"print(open_keystore(Path({str(tmp_path)!r}) / 'node').address)"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ),
        )
        for _ in range(4)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"x")
        child.stdin.close()
        child.stdin = None
    addresses = {child.communicate(timeout=60)[0] for child in children}
    assert [child.returncode for child in children] == [0] * 4
    assert addresses == {open_keystore(tmp_path / "node").address.encode() + b"\n"}
    assert len(list((tmp_path / "node").iterdir())) == 2


def test_the_pass_phrase_can_be_changed_and_the_key_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keystore, "SCRYPT_N", FAST)
    seed = open_keystore(tmp_path)
    change_passphrase(tmp_path, old=None, new="my own")
    assert json.loads((tmp_path / KEY_FILE).read_text())["crypto"]["kdfparams"]["n"] == FAST
    assert not (tmp_path / PHRASE_FILE).exists()
    assert open_keystore(tmp_path, passphrase="my own").address == seed.address
    with pytest.raises(ConfigurationError):
        change_passphrase(tmp_path, old="another", new=None)
    change_passphrase(tmp_path, old="my own", new=None)
    assert open_keystore(tmp_path).address == seed.address
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600


def test_a_guess_at_a_persons_phrase_costs_much() -> None:
    assert keystore.SCRYPT_N >= 2**17


def test_a_raw_key_is_read_and_never_repeated() -> None:
    secret = "ab" * 32
    assert identity_from_hex(f"0x{secret}\n").address == identity_from_hex(secret).address
    for wrong in ("xyz" * 21, "ab" * 31, "00" * 32):
        with pytest.raises(ConfigurationError) as caught:
            identity_from_hex(wrong)
        assert wrong not in str(caught.value)
