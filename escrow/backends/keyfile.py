"""Web3 Secret Storage of version 3: the encrypted key files that Ethereum wallets share.

The usual library for it computes pairings of another curve while it is loaded, half a second of
each command, and raises Python's limit of recursion. This is the one version that wallets write.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import uuid
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from coase.protocol.identity import keccak256

VERSION: Final = 3
_CIPHER: Final = "aes-128-ctr"
_KEY_SIZE_BYTES: Final = 16  # Of the cipher; as much again of the derived key goes into the MAC.
_DERIVED_SIZE_BYTES: Final = 32
_SALT_SIZE_BYTES: Final = 32
_SCRYPT_R: Final = 8  # 128 * N * r bytes of memory.
_SCRYPT_P: Final = 1


class WrongPassphrase(ValueError):
    """The pass phrase is another one, or the file was changed."""


def seal(secret: bytes, passphrase: bytes, *, address: str, scrypt_n: int) -> dict[str, Any]:
    """Return ``secret`` encrypted under ``passphrase``, each time anew, as JSON is made of."""
    salt, start = secrets.token_bytes(_SALT_SIZE_BYTES), secrets.token_bytes(_KEY_SIZE_BYTES)
    parameters = {
        "dklen": _DERIVED_SIZE_BYTES,
        "n": scrypt_n,
        "p": _SCRYPT_P,
        "r": _SCRYPT_R,
        "salt": salt.hex(),
    }
    derived = _derive("scrypt", parameters, passphrase)
    sealed = _crypt(derived, start, secret)
    return {
        # As the format's own examples and most wallets write it: some compare it as text.
        "address": address.removeprefix("0x").lower(),
        "crypto": {
            "cipher": _CIPHER,
            "cipherparams": {"iv": start.hex()},
            "ciphertext": sealed.hex(),
            "kdf": "scrypt",
            "kdfparams": parameters,
            "mac": _mac(derived, sealed).hex(),
        },
        "id": str(uuid.uuid4()),
        "version": VERSION,
    }


def unseal(made: dict[str, Any], passphrase: bytes) -> bytes:
    """Return the secret in a key file; capitals in its names do not matter.

    :raises WrongPassphrase: if the pass phrase does not open it
    :raises ValueError: if a part of it is not what it must be; so do TypeError, KeyError and
        AttributeError
    """
    made = _lowered(made)
    if made["version"] != VERSION:
        raise ValueError(f"a key file of version {made['version']}")
    crypto = made["crypto"]
    if crypto.get("cipher", _CIPHER) != _CIPHER:
        raise ValueError(f"a cipher called {crypto['cipher']!r}")
    sealed = _bytes(crypto["ciphertext"])
    derived = _derive(crypto["kdf"], crypto["kdfparams"], passphrase)
    if not hmac.compare_digest(_mac(derived, sealed), _bytes(crypto["mac"])):
        raise WrongPassphrase("the pass phrase does not open the key file")
    return _crypt(derived, _bytes(crypto["cipherparams"]["iv"]), sealed)


def _derive(function: str, parameters: dict[str, Any], passphrase: bytes) -> bytes:
    salt, size = _bytes(parameters["salt"]), int(parameters["dklen"])
    if size < _DERIVED_SIZE_BYTES:
        raise ValueError(f"a derived key of {size} bytes")
    if function == "scrypt":
        n, r, p = (int(parameters[name]) for name in ("n", "r", "p"))
        if n < 1 << 16 * r:
            return Scrypt(salt=salt, length=size, n=n, r=r, p=p).derive(passphrase)
        # Beyond what scrypt is defined for, yet old wallets did so, and so does the format's own
        # example. OpenSSL refuses it.
        from Crypto.Protocol.KDF import scrypt

        words = passphrase.decode("latin-1"), salt.decode("latin-1")  # It takes bytes as text.
        return bytes(scrypt(*words, key_len=size, N=n, r=r, p=p))  # type: ignore[arg-type]
    if function == "pbkdf2":
        kind, _, name = str(parameters["prf"]).partition("-")
        if kind != "hmac":
            raise ValueError(f"a function called {parameters['prf']!r}")
        return hashlib.pbkdf2_hmac(name, passphrase, salt, int(parameters["c"]), size)
    raise ValueError(f"a derivation called {function!r}")


def _mac(derived: bytes, sealed: bytes) -> bytes:
    return keccak256(derived[_KEY_SIZE_BYTES:_DERIVED_SIZE_BYTES] + sealed)


def _crypt(derived: bytes, start: bytes, text: bytes) -> bytes:
    # Some wallets leave out leading zeros of the counter's start.
    counter = modes.CTR(start.rjust(_KEY_SIZE_BYTES, b"\0"))
    cipher = Cipher(algorithms.AES(derived[:_KEY_SIZE_BYTES]), counter).encryptor()
    return cipher.update(text) + cipher.finalize()


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.removeprefix("0x"))


def _lowered(value: dict[str, Any]) -> dict[str, Any]:
    return {
        str(name).lower(): _lowered(each) if isinstance(each, dict) else each
        for name, each in value.items()
    }
