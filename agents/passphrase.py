"""Where the pass phrase of a keystore comes from: never an argument, never the environment itself.

An open file descriptor, a file that only its owner reads, the system's keyring, or the terminal.
"""

from __future__ import annotations

import getpass
import importlib
import os
import secrets
import stat
import sys
from typing import TYPE_CHECKING, Any, Final

from coase.escrow.backends.keystore import KEY_FILE, PHRASE_FILE
from coase.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

PASSPHRASE_MAX_BYTES: Final = 1024
PHRASE_SIZE_BYTES: Final = 32
FILE_VARIABLE: Final = "COASE_PASSPHRASE_FILE"
KEYRING_SERVICE: Final = "coase"
_HOW: Final = (
    f"put it into a file that only you can read and name that in {FILE_VARIABLE}, or be asked for"
    " it at a terminal, or keep it in the system's keyring with: coase keys new NAME --keyring"
)


def find_passphrase(
    directory: Path, *, local: bool, fd: int | None = None, keyring: bool = False
) -> str | None:
    """Return the pass phrase of the keystore in ``directory``; None stands for the kept random one.

    On a ``local`` chain a new keystore needs none of its owner's. One that does not exist yet is
    asked for twice at a terminal, and a new entry of the keyring is made at random.

    :raises ConfigurationError: if it comes from nowhere; says from where it could
    """
    fresh = not (directory / KEY_FILE).exists()
    if fd is not None:
        return read_descriptor(fd)
    if keyring:
        return from_keyring(directory, required=True) or _into_keyring(directory, fresh=fresh)
    if (directory / PHRASE_FILE).exists() or (local and fresh):
        return None
    if path := os.environ.get(FILE_VARIABLE, ""):
        return _from_file(path)
    kept = from_keyring(directory, required=False)
    if kept:
        return kept
    if can_ask():
        if fresh:
            return ask_new(f"pass phrase for the new keys in {directory}: ")
        return ask(f"pass phrase of {directory / KEY_FILE}: ")
    if local:
        return None  # The keystore itself says that its random phrase is missing.
    raise ConfigurationError(
        f"this network is not a local one, so the keystore needs a pass phrase of yours: {_HOW}"
    )


def read_descriptor(fd: int) -> str:
    """Return the pass phrase that an open file descriptor holds, up to the end of its first line.

    :raises ConfigurationError: if it cannot be read, or there is none
    """
    if fd <= 2 and os.isatty(fd):
        raise ConfigurationError(f"--passphrase-fd {fd} is the terminal: redirect a file to it")
    try:
        with os.fdopen(os.dup(fd), "rb") as file:
            content = file.read(PASSPHRASE_MAX_BYTES + 1)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"file descriptor {fd} cannot be read: {getattr(error, 'strerror', None) or error};"
            f" open it, for example with {fd}< FILE"
        ) from error
    return _one_line(content, f"file descriptor {fd}")


def can_ask() -> bool:
    """Return whether somebody sits at a terminal who could be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask(question: str) -> str:
    """Ask for a secret at the terminal, which does not show it.

    :raises ConfigurationError: if there is no terminal, or nothing was typed
    """
    if not can_ask():
        raise ConfigurationError(f"nobody can be asked ({question.rstrip(': ')}): {_HOW}")
    try:
        typed = getpass.getpass(question, stream=sys.stderr)
    except EOFError:
        typed = ""
    if not typed:
        raise ConfigurationError("nothing was typed: nothing was done")
    return typed


def ask_new(question: str) -> str:
    """Ask for a new pass phrase, twice.

    :raises ConfigurationError: if they differ, or there is no terminal
    """
    phrase = ask(question)
    if ask("the same again: ") != phrase:
        raise ConfigurationError("the two pass phrases differ: nothing was done")
    return phrase


def from_keyring(directory: Path, *, required: bool) -> str | None:
    """Return what the system's keyring holds for ``directory``, or None.

    :raises ConfigurationError: if ``required`` and there is no keyring here
    """
    keyring = _keyring(required=required)
    if keyring is None:
        return None
    try:
        found = keyring.get_password(KEYRING_SERVICE, str(directory.resolve()))
    except keyring.errors.KeyringError as error:
        if required:
            raise ConfigurationError(f"the system's keyring cannot be used: {error}") from error
        return None
    return str(found) if found else None


def _into_keyring(directory: Path, *, fresh: bool) -> str:
    if not fresh:
        raise ConfigurationError(
            f"the system's keyring has no pass phrase for {directory.resolve()}: give it another"
            " way, for example with --passphrase-fd"
        )
    keyring, phrase = _keyring(required=True), secrets.token_hex(PHRASE_SIZE_BYTES)
    try:
        keyring.set_password(KEYRING_SERVICE, str(directory.resolve()), phrase)
    except keyring.errors.KeyringError as error:
        raise ConfigurationError(f"the system's keyring takes nothing: {error}") from error
    return phrase


def _keyring(*, required: bool) -> Any:
    try:
        importlib.import_module("keyring.errors")
        return importlib.import_module("keyring")
    except ImportError as error:
        if not required:
            return None
        raise ConfigurationError(
            "the package keyring is not installed, which speaks to the system's keyring: install"
            " it beside Coase with: pip install keyring"
        ) from error


def _from_file(path: str) -> str:
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if stat.S_ISREG(found.st_mode) and found.st_mode & 0o077:
                raise ConfigurationError(
                    f"others on this machine can read {path} (mode {found.st_mode & 0o777:o}):"
                    f" chmod 600 {path}"
                )
            content = file.read(PASSPHRASE_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    return _one_line(content, path)


def _one_line(content: bytes, where: str) -> str:
    line = content.split(b"\n", 1)[0].rstrip(b"\r")
    try:
        phrase = line.decode()
    except UnicodeDecodeError:
        phrase = ""
    if not phrase or len(content) > PASSPHRASE_MAX_BYTES:
        raise ConfigurationError(
            f"{where} holds no pass phrase: one line of up to {PASSPHRASE_MAX_BYTES} bytes of text"
        )
    return phrase
