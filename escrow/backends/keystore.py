"""The node's seed in one encrypted file; agents' keys are derived from it by name.

The file is the usual scrypt JSON of Ethereum wallets, so that any of them can open it. Opening it
takes most of a second on purpose: it happens once, at the start of a node.

A key that was made elsewhere lies beside it in a file of its own, under the same pass phrase, and
takes the place of the one that would be derived. Which names have which addresses stands in a third
file, in plain, so that they can be listed without the pass phrase.

On a local chain the pass phrase is a random file beside it: no stranger on this machine reads it,
and nobody is asked. Where the money is real the pass phrase comes from its owner.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from coase.protocol.errors import ConfigurationError
from coase.protocol.identity import Identity

from . import keyfile

if TYPE_CHECKING:
    from pathlib import Path

KEY_FILE: Final = "node.key.json"
PHRASE_FILE: Final = "node.passphrase"
KEYS_DIRECTORY: Final = "keys"
NAMES_FILE: Final = "keys.json"
SCRYPT_N: Final = 2**17  # 128 MiB and some tenths of a second for each guess at a phrase.
SCRYPT_N_RANDOM: Final = 2**12  # Nobody guesses 256 random bits, however fast he tries.
PHRASE_SIZE_BYTES: Final = 32
FILE_SIZE_MAX_BYTES: Final = 16 * 1024  # It has about 500; a wrong file must not fill the memory.
NAMES_SIZE_MAX_BYTES: Final = 4 * 1024 * 1024  # Some ten thousand agents of one node.
KEY_NAME_MAX: Final = 64
# A stranger's file says how much work its opening is: 1 GiB of memory or a minute is no key's.
KDF_MEMORY_MAX_BYTES: Final = 2**30
KDF_ROUNDS_MAX: Final = 10_000_000
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_KEY_ADDRESS: Final = re.compile(r"0x[0-9a-f]{40}\Z")


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """What is known of a key without its secret."""

    name: str
    address: str
    imported: bool = False


class KeyRing:
    """The keys of one node: those that were imported, and all others derived from its seed."""

    def __init__(self, directory: Path, seed: Identity, passphrase: str) -> None:
        self.directory, self.seed = directory, seed
        self._passphrase = passphrase
        self._imported: dict[str, Identity] = {}

    def derive(self, name: str) -> Identity:
        """Return the key of the agent ``name``, and note its address for whoever lists the keys.

        :raises ConfigurationError: if an imported key of that name cannot be opened
        """
        identity = self._imported.get(name) or self._open(name) or self.seed.derive(name)
        self._note(name, identity.address)
        return identity

    def imported(self, name: str) -> bool:
        """Return whether the key of ``name`` was made elsewhere."""
        return _key_path(self.directory, name).exists()

    def add(self, name: str, identity: Identity, *, scrypt_n: int | None = None) -> None:
        """Keep ``identity``, made elsewhere, as the key of ``name``.

        :raises ConfigurationError: if there is a key of that name; it stays as it is
        """
        known = names_in(self.directory).get(name)
        path = _key_path(self.directory, name)
        if known is not None or path.exists():
            where = f" ({known})" if known else ""
            raise ConfigurationError(
                f"{self.directory} has a key {name!r} already{where}: nothing was changed"
            )
        if identity.address in names_in(self.directory).values():
            raise ConfigurationError(f"{self.directory} has the key {identity.address} already")
        path.parent.mkdir(mode=0o700, exist_ok=True)
        random = (self.directory / PHRASE_FILE).exists()
        cost = scrypt_n or (SCRYPT_N_RANDOM if random else SCRYPT_N)
        _create(path, seal_key(identity, self._passphrase, scrypt_n=cost))
        self._note(name, identity.address)

    def _open(self, name: str) -> Identity | None:
        path = _key_path(self.directory, name)
        content = _read(path)
        if content is None:
            return None
        identity = self._imported[name] = Identity(_open(path, content, self._passphrase))
        noted = names_in(self.directory).get(name)
        if noted not in (None, identity.address):
            raise ConfigurationError(
                f"{path} holds {identity.address}, and {NAMES_FILE} says {noted}: one of them is"
                " another node's"
            )
        return identity

    def _note(self, name: str, address: str) -> None:
        names = names_in(self.directory)
        if names.get(name) == address:
            return
        names[name] = address
        path = self.directory / NAMES_FILE
        _write_aside(path, json.dumps(names, indent=1) + "\n").replace(path)


def open_keyring(
    directory: Path, *, passphrase: str | None = None, scrypt_n: int | None = None
) -> KeyRing:
    """Return the keys of the node in ``directory``; raises what ``open_keystore`` raises."""
    seed = open_keystore(directory, passphrase=passphrase, scrypt_n=scrypt_n)
    phrase = _kept_phrase(directory, make=False) if passphrase is None else passphrase
    return KeyRing(directory, seed, phrase)


def names_in(directory: Path) -> dict[str, str]:
    """Return the agents' names and addresses that a node noted; needs no pass phrase.

    :raises ConfigurationError: if the list is damaged, or others could write it
    """
    path = directory / NAMES_FILE
    content = _read(path, size_max=NAMES_SIZE_MAX_BYTES)
    try:
        names = {} if content is None else json.loads(content)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, dict) or not all(
        isinstance(address, str) and _KEY_ADDRESS.match(address) for address in names.values()
    ):
        raise ConfigurationError(
            f"{path} is damaged: move it away, and it is written anew when the node starts"
        )
    return names


def list_keys(directory: Path) -> list[KeyFacts]:
    """Return the keys of a node, by name, as far as they were ever used, made or imported."""
    return [
        KeyFacts(name, address, imported=_key_path(directory, name).exists())
        for name, address in sorted(names_in(directory).items())
    ]


def seal_key(identity: Identity, passphrase: str, *, scrypt_n: int | None = None) -> str:
    """Return a key as Web3 Secret Storage of version 3, which other wallets read.

    :raises ConfigurationError: if the pass phrase is empty
    """
    if not passphrase:
        raise ConfigurationError("the pass phrase is empty")
    return _sealed(identity, passphrase, scrypt_n or SCRYPT_N)


def open_key_file(path: Path, passphrase: str) -> Identity:
    """Return the key in a file of another wallet: Web3 Secret Storage, scrypt or PBKDF2.

    :raises ConfigurationError: if it is none, is damaged, or the pass phrase does not open it
    """
    content = read_key_file(path)
    identity = Identity(_open(path, content, passphrase))
    told = address_in(content)
    if told and told != identity.address:
        raise ConfigurationError(f"{path} says that it holds {told}, and holds {identity.address}")
    return identity


def read_key_file(path: Path) -> str:
    """Return what is in a key file of another wallet, once it is clear that it may be opened.

    :raises ConfigurationError: if it is none, or opening it would take more than a machine has
    """
    content = _read(path)
    if content is None:
        raise ConfigurationError(f"{path} does not exist")
    try:
        made = json.loads(content)
        made = {key.lower(): value for key, value in made.items()}
        crypto = made["crypto"]
        parameters = crypto["kdfparams"]
        blocks = int(parameters.get("n", 0)) * int(parameters.get("r", 0))
        rounds = max(int(parameters.get("c", 0)), blocks * int(parameters.get("p", 1)))
        third = int(made["version"]) == 3
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigurationError(
            f"{path} is no key file: Web3 Secret Storage (a JSON file with crypto in it) is"
        ) from error
    if not third:
        raise ConfigurationError(f"{path} is of version {made['version']}, and keys are of 3")
    if 128 * blocks > KDF_MEMORY_MAX_BYTES or rounds > KDF_ROUNDS_MAX:
        raise ConfigurationError(f"{path} asks for more work than any wallet does: not opened")
    return content


def address_in(content: str) -> str:
    """Return the address that a key file says to hold, or nothing if it does not say."""
    told = str({k.lower(): v for k, v in json.loads(content).items()}.get("address") or "").lower()
    return "0x" + told.removeprefix("0x") if told else ""


def require_key_name(name: str) -> None:
    """Return if an agent can be called ``name``.

    :raises ConfigurationError: if not
    """
    if not name or len(name) > KEY_NAME_MAX or not name.replace("-", "").isalnum():
        raise ConfigurationError(
            f"{name!r} is no name for a key: up to {KEY_NAME_MAX} letters, digits and hyphens"
        )


def write_secret(path: Path, content: str) -> None:
    """Write a new private file, whole or not at all.

    :raises ConfigurationError: if there is one already, or the disk refuses
    """
    if path.exists():
        raise ConfigurationError(f"{path} exists already: nothing was written")
    try:
        _create(path, content)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror or error}") from error


def _key_path(directory: Path, name: str) -> Path:
    return directory / KEYS_DIRECTORY / f"{name}.json"


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
        _create(path, _sealed(Identity(secrets.token_bytes(32)), passphrase, cost))
        content = _read(path)  # Ours, or that of who was first.
    return Identity(_open(path, content or "", passphrase))


def change_passphrase(directory: Path, *, old: str | None, new: str | None) -> None:
    """Encrypt the seed anew; ``None`` stands for the random one in the file beside it.

    The file is replaced in one step: a crash leaves the old one or the new one.

    :raises ConfigurationError: if ``old`` does not open it
    """
    seed = open_keystore(directory, passphrase=old)
    phrase = _kept_phrase(directory, make=True) if new is None else new
    if not phrase:
        raise ConfigurationError("the pass phrase of the keystore is empty")
    cost = SCRYPT_N_RANDOM if new is None else SCRYPT_N
    fresh = _write_aside(directory / KEY_FILE, _sealed(seed, phrase, cost))
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


def _sealed(identity: Identity, passphrase: str, cost: int) -> str:
    secret, address = identity.secret_for_keystore(), identity.address
    return (
        json.dumps(keyfile.seal(secret, passphrase.encode(), address=address, scrypt_n=cost)) + "\n"
    )


def _open(path: Path, content: str, passphrase: str) -> bytes:
    try:
        made: dict[str, Any] = json.loads(content)
        return keyfile.unseal(made, passphrase.encode())
    except keyfile.WrongPassphrase as error:
        raise ConfigurationError(f"the pass phrase does not open {path}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is damaged: restore it from a copy") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"{path} is no keystore of this kind") from error


def _read(path: Path, *, size_max: int = FILE_SIZE_MAX_BYTES) -> str | None:
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
        if found.st_size > size_max:
            raise ConfigurationError(f"{path} is too large to be a keystore")
        try:
            return file.read()
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{path} is no text, and so no keystore") from error


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
