"""The node's seed in one encrypted file; agents' keys are derived from it by name.

The file is the usual scrypt JSON of Ethereum wallets, so that any of them can open it. Opening it
takes most of a second on purpose: it happens once, at the start of a node.

On a local chain the pass phrase is a random file beside it: no stranger on this machine reads it,
and nobody is asked. Where the money is real the pass phrase comes from its owner.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import sys
from typing import TYPE_CHECKING, Any, Final

from coase.protocol.errors import ConfigurationError
from coase.protocol.identity import Identity

# What it brings along raises Python's limit of recursion to 100,000: with that, deeply nested JSON
# from a stranger would run a parser out of its stack and end the process.
_recursion_limit = sys.getrecursionlimit()
from eth_keyfile.keyfile import create_keyfile_json, decode_keyfile_json  # noqa: E402

sys.setrecursionlimit(_recursion_limit)

if TYPE_CHECKING:
    from pathlib import Path

KEY_FILE: Final = "node.key.json"
PHRASE_FILE: Final = "node.passphrase"
SCRYPT_N: Final = 2**17  # 128 MiB and some tenths of a second for each guess at a phrase.
SCRYPT_N_RANDOM: Final = 2**12  # Nobody guesses 256 random bits, however fast he tries.
PHRASE_SIZE_BYTES: Final = 32
FILE_SIZE_MAX_BYTES: Final = 16 * 1024  # It has about 500; a wrong file must not fill the memory.
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def open_keystore(
    directory: Path, *, passphrase: str | None = None, scrypt_n: int | None = None
) -> Identity:
    """Return the node's seed out of ``directory``; the first time it is made there.

    Without ``passphrase`` a random one is kept in a file beside it. Agents' keys are
    ``seed.derive(name)``. Two processes that make it at once end with the same one.

    :raises ConfigurationError: if the pass phrase is wrong or missing, the file is damaged, or
        others on this machine could read it
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / KEY_FILE
    content = _read(path)
    cost = scrypt_n or (SCRYPT_N_RANDOM if passphrase is None else SCRYPT_N)
    if passphrase is None:
        passphrase = _kept_phrase(directory, make=content is None)
    elif not passphrase:
        raise ConfigurationError("the pass phrase of the keystore is empty")
    if content is None:
        seed = secrets.token_bytes(32)
        made = create_keyfile_json(seed, passphrase.encode(), kdf="scrypt", iterations=cost)
        _create(path, json.dumps(made))
        content = _read(path)  # Ours, or that of who was first.
    return Identity(_open(path, content or "", passphrase))


def change_passphrase(directory: Path, *, old: str | None, new: str | None) -> None:
    """Encrypt the seed anew; ``None`` stands for the random one in the file beside it.

    The file is replaced in one step: a crash leaves the old one or the new one.

    :raises ConfigurationError: if ``old`` does not open it
    """
    seed = open_keystore(directory, passphrase=old).secret_for_keystore()
    phrase = _kept_phrase(directory, make=True) if new is None else new
    if not phrase:
        raise ConfigurationError("the pass phrase of the keystore is empty")
    cost = SCRYPT_N_RANDOM if new is None else SCRYPT_N
    made = create_keyfile_json(seed, phrase.encode(), kdf="scrypt", iterations=cost)
    fresh = _write_aside(directory / KEY_FILE, json.dumps(made))
    fresh.replace(directory / KEY_FILE)
    if new is not None:
        (directory / PHRASE_FILE).unlink(missing_ok=True)


def identity_from_hex(text: str) -> Identity:
    """Return the key that is written as 64 hex digits, as an environment variable holds it.

    :raises ConfigurationError: if it is none; the message does not repeat it
    """
    try:
        secret = bytes.fromhex(text.strip().removeprefix("0x"))
    except ValueError as error:
        raise ConfigurationError("a raw key is 64 hex digits") from error
    return Identity(secret)


def _kept_phrase(directory: Path, *, make: bool) -> str:
    path = directory / PHRASE_FILE
    content = _read(path)
    if content is None:
        if not make:
            raise ConfigurationError(
                f"{directory / KEY_FILE} needs its pass phrase: give it, or put {PHRASE_FILE} "
                "back beside it"
            )
        _create(path, secrets.token_hex(PHRASE_SIZE_BYTES) + "\n")
        content = _read(path) or ""
    phrase = content.strip()
    if not phrase:
        raise ConfigurationError(f"{path} is empty: the pass phrase of the keystore is missing")
    return phrase


def _open(path: Path, content: str, passphrase: str) -> bytes:
    try:
        made: dict[str, Any] = json.loads(content)
        return decode_keyfile_json(made, passphrase.encode())
    except ValueError as error:
        if "MAC mismatch" in str(error):
            raise ConfigurationError(f"the pass phrase does not open {path}") from error
        raise ConfigurationError(f"{path} is damaged: restore it from a copy") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"{path} is no keystore of this kind") from error


def _read(path: Path) -> str | None:
    """Return what is in a private file, or None if there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    with os.fdopen(handle) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ConfigurationError(f"{path} is no plain file")
        if found.st_mode & _OTHERS:
            raise ConfigurationError(
                f"others on this machine can read {path} (mode {found.st_mode & 0o777:o}): if it "
                f"has not leaked, chmod 600 {path}"
            )
        if found.st_uid != os.geteuid():
            raise ConfigurationError(f"{path} belongs to another user of this machine")
        if found.st_size > FILE_SIZE_MAX_BYTES:
            raise ConfigurationError(f"{path} is too large to be a keystore")
        return file.read()


def _create(path: Path, content: str) -> None:
    """Make a private file whole or not at all; if another made it first, that one stays."""
    fresh = _write_aside(path, content)
    try:
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(fresh)
    finally:
        fresh.unlink(missing_ok=True)
    _sync(path.parent)


def _write_aside(path: Path, content: str) -> Path:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return fresh


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
