"""The join code: 128 secret bits that one person reads out and another types in.

It is the one thing that machines of a local network share; who has it is in. Everything else
follows from it: the id that is advertised, the name of the network, the key that signs the
certificates. The text is 26 symbols of 5 bits and two check symbols, in an alphabet without I, L,
O and U, so that it survives handwriting and telephones.

The check symbols make it a Reed-Solomon code over 32 elements with distance 3. So *every* one or
two wrong characters are noticed, and with that every exchange of two, neighbours or not; of all
other accidents one in 1,024 passes. A lone wrong character is even located. It is never corrected
silently: two wrong ones look like another lone one.
"""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from dataclasses import dataclass, field
from functools import reduce
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .errors import ConfigurationError

SECRET_BYTES: Final = 16
SYMBOLS: Final = 28
ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
TEXT_MAX_CHARS: Final = 256  # With all its blanks; whoever pastes more pasted something else.

_DATA_SYMBOLS: Final = 26  # 130 bits, the last two of them zero.
_PAD_BITS: Final = 2
_GROUP: Final = 4
_IGNORED: Final = ("Pd", "Pc", "Cf", "Sm")  # Dashes, underlines, invisible marks, minus signs.
_ALIKE: Final = {"O": "0", "I": "1", "L": "1"}
_VALUE: Final = {letter: value for value, letter in enumerate(ALPHABET)} | {
    written: ALPHABET.index(meant) for written, meant in _ALIKE.items()
}
_DERIVED_BYTES: Final = 32
_SALT: Final = b"coase/lan/v1"
_TAG_BYTES: Final = 16
_NET_DIGITS: Final = 12  # 48 bits: two networks of one name are not met by accident.

# The field of 32 elements: x^5 + x^2 + 1, whose root 2 reaches every other element.
_ORDER: Final = 31
_POLYNOMIAL: Final = 0b100101
_ANTILOG: Final = tuple(
    reduce(lambda x, _: x << 1 ^ (_POLYNOMIAL if x & 16 else 0), range(power), 1)
    for power in range(_ORDER)
)
_LOG: Final = {element: power for power, element in enumerate(_ANTILOG)}


@dataclass(frozen=True, slots=True)
class JoinCode:
    """A join code. Its repr shows the network's public name only."""

    _secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self._secret) != SECRET_BYTES:
            raise ConfigurationError(
                f"a join code is made of {SECRET_BYTES} random bytes, not of {len(self._secret)}"
            )

    @classmethod
    def of(cls, secret: bytes) -> JoinCode:
        """Return the code of 16 random bytes.

        :raises ConfigurationError: if they are not 16
        """
        return cls(bytes(secret))

    @classmethod
    def parse(cls, text: str) -> JoinCode:
        """Return the code that was typed: any case, any dashes and blanks; O is 0, I and L are 1.

        :raises ConfigurationError: if it is none; says what is wrong and where, never what was
            typed, since most of it may be the secret
        """
        symbols = _symbols(text)
        if len(symbols) != SYMBOLS:
            raise ConfigurationError(
                f"a join code has {SYMBOLS} letters and digits and this has {len(symbols)}:"
                " copy it again, whole"
            )
        zero, first = _syndromes(symbols)
        if zero or first:
            raise ConfigurationError(f"the join code has a typing error{_whereabouts(zero, first)}")
        bits = reduce(lambda whole, symbol: whole << 5 | symbol, symbols[:_DATA_SYMBOLS], 0)
        if bits & (1 << _PAD_BITS) - 1:
            raise ConfigurationError(
                f"the join code has a typing error: character {_DATA_SYMBOLS} and others are wrong"
            )
        return cls((bits >> _PAD_BITS).to_bytes(SECRET_BYTES))

    @property
    def secret_bytes(self) -> bytes:
        """The 16 bytes themselves."""
        return self._secret

    @property
    def text(self) -> str:
        """What a person reads out: seven groups of four. Show it to nobody else."""
        bits = int.from_bytes(self._secret) << _PAD_BITS
        data = [bits >> 5 * place & 31 for place in reversed(range(_DATA_SYMBOLS))]
        letters = "".join(ALPHABET[symbol] for symbol in (*data, *_checks(data)))
        return "-".join(letters[at : at + _GROUP] for at in range(0, SYMBOLS, _GROUP))

    @property
    def network_tag(self) -> str:
        """The id that is advertised, 32 hex digits. It tells nothing about the code."""
        return hmac.digest(self._secret, b"coase-net", hashlib.sha256)[:_TAG_BYTES].hex()

    @property
    def net(self) -> str:
        """The network's name in subjects and of the cluster; another code, another name."""
        return f"lan-{self.network_tag[:_NET_DIGITS]}"

    @property
    def ca_seed(self) -> bytes:
        """The Ed25519 seed of the authority that signs this network's certificates."""
        return self.secret("ca")

    def secret(self, purpose: str) -> bytes:
        """Return 32 bytes that only who has the code can know, others for each purpose."""
        kdf = HKDF(SHA256(), _DERIVED_BYTES, salt=_SALT, info=purpose.encode())
        return kdf.derive(self._secret)

    def __repr__(self) -> str:
        return f"JoinCode({self.net})"


def _symbols(text: str) -> list[int]:
    if len(text) > TEXT_MAX_CHARS:
        raise ConfigurationError(
            f"a join code has {SYMBOLS} letters and digits and this has {len(text)} characters"
        )
    symbols: list[int] = []
    for letter in text:
        if letter.isspace() or unicodedata.category(letter) in _IGNORED:
            continue
        value = _VALUE.get(letter.upper())
        if value is None:
            raise ConfigurationError(
                f"character {len(symbols) + 1} (dashes not counted) cannot be in a join code,"
                " which has the digits and the letters but U"
            )
        symbols.append(value)
    return symbols


def _times(left: int, right: int) -> int:
    return _ANTILOG[(_LOG[left] + _LOG[right]) % _ORDER] if left and right else 0


def _over(left: int, right: int) -> int:
    return _ANTILOG[(_LOG[left] - _LOG[right]) % _ORDER] if left else 0


def _syndromes(symbols: list[int]) -> tuple[int, int]:
    """Return the sum of the symbols, and that of each times 2 to the power of its place."""
    zero = first = 0
    for place, symbol in enumerate(symbols):
        zero ^= symbol
        first ^= _times(_ANTILOG[place], symbol)
    return zero, first


def _checks(data: list[int]) -> tuple[int, int]:
    """Return the two symbols that make both sums zero."""
    zero, first = _syndromes(data)
    ahead, last = _ANTILOG[_DATA_SYMBOLS], _ANTILOG[_DATA_SYMBOLS + 1]
    check = _over(first ^ _times(last, zero), ahead ^ last)
    return check, check ^ zero


def _whereabouts(zero: int, first: int) -> str:
    place = _LOG[_over(first, zero)] if zero and first else SYMBOLS
    if place >= SYMBOLS:
        return ": two or more characters are wrong or have changed places"
    return (
        f": if a single character is wrong it is number {place + 1}"
        f" (group {place // _GROUP + 1}, dashes not counted)"
    )
