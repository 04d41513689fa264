"""Key files are those of other wallets, both ways."""

from __future__ import annotations

import json
from typing import Any

import pytest
from eth_account import Account

from coase.escrow.backends.keyfile import WrongPassphrase, seal, unseal
from coase.protocol.identity import Identity

FAST = 2**10
SECRET = bytes.fromhex("7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d")
PHRASE = b"testpassword"
# The format's own two examples.
PBKDF2: dict[str, Any] = {
    "crypto": {
        "cipher": "aes-128-ctr",
        "cipherparams": {"iv": "6087dab2f9fdbbfaddc31a909735c1e6"},
        "ciphertext": "5318b4d5bcd28de64ee5559e671353e16f075ecae9f99c7a79a38af5f869aa46",
        "kdf": "pbkdf2",
        "kdfparams": {
            "c": 262144,
            "dklen": 32,
            "prf": "hmac-sha256",
            "salt": "ae3cd4e7013836a3df6bd7241b12db061dbe2c6785853cce422d148a624ce0bd",
        },
        "mac": "517ead924a9d0dc3124507e3393d175ce3ff7c1e96529c6c555ce9e51205e9b2",
    },
    "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6",
    "version": 3,
}
SCRYPT: dict[str, Any] = {
    "crypto": {
        "cipher": "aes-128-ctr",
        "cipherparams": {"iv": "83dbcc02d8ccb40e466191a123791e0e"},
        "ciphertext": "d172bf743a674da9cdad04534d56926ef8358534d458fffccd4e6ad2fbde479c",
        "kdf": "scrypt",
        "kdfparams": {
            "dklen": 32,
            "n": 262144,
            "r": 1,
            "p": 8,
            "salt": "ab0c7876052600dd703518d6fc3fe8984592145b591fc8fb5c6d43190334ba19",
        },
        "mac": "2103ac29920d71da29f15d75b4a16dbe95cfd7ff8faea1056c33131d846e3097",
    },
    "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6",
    "version": 3,
}


@pytest.mark.parametrize("example", [PBKDF2, SCRYPT], ids=["pbkdf2", "scrypt"])
def test_the_examples_of_the_format_open(example: dict[str, Any]) -> None:
    assert unseal(example, PHRASE) == SECRET


def test_other_wallets_open_ours_and_we_theirs() -> None:
    identity = Identity(SECRET)
    ours = seal(SECRET, PHRASE, address=identity.address, scrypt_n=FAST)
    assert bytes(Account.decrypt(json.dumps(ours), PHRASE.decode())) == SECRET
    assert "0x" + ours["address"] == identity.address
    for kdf in ("scrypt", "pbkdf2"):
        theirs = Account.encrypt(SECRET, PHRASE.decode(), kdf=kdf, iterations=FAST)
        assert unseal(theirs, PHRASE) == SECRET
        capitals = {name.upper(): value for name, value in theirs.items()}
        assert unseal(capitals, PHRASE) == SECRET


def test_what_was_changed_does_not_open() -> None:
    made = seal(SECRET, PHRASE, address=Identity(SECRET).address, scrypt_n=FAST)
    with pytest.raises(WrongPassphrase):
        unseal(made, b"another")
    changed = made["crypto"] | {"ciphertext": "00" * 32}
    with pytest.raises(WrongPassphrase):
        unseal(made | {"crypto": changed}, PHRASE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cipher": "aes-256-gcm"},
        {"kdf": "argon2"},
        {"kdfparams": {"n": 3, "r": 8, "p": 1, "dklen": 32, "salt": "00"}},
        {"kdfparams": {"n": FAST, "r": 8, "p": 1, "dklen": 0, "salt": "00"}},
        {"kdf": "pbkdf2", "kdfparams": {"c": 1, "prf": "md5", "dklen": 32, "salt": "00"}},
        {"mac": "no hex"},
    ],
)
def test_what_is_no_key_file_is_said(wrong: dict[str, Any]) -> None:
    made = seal(SECRET, PHRASE, address=Identity(SECRET).address, scrypt_n=FAST)
    with pytest.raises(ValueError, match=r".") as caught:
        unseal(made | {"crypto": made["crypto"] | wrong}, PHRASE)
    assert not isinstance(caught.value, WrongPassphrase)


def test_another_version_is_said() -> None:
    with pytest.raises(ValueError, match="version 4"):
        unseal(SCRYPT | {"version": 4}, PHRASE)
