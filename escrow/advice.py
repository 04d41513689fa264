"""What a refusal of the escrow or its token means for people, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from coase.protocol.errors import CallReverted

_POOR: Final = "the wallet holds too little of the token: send it some, or lower the price"
_FEE: Final = (
    "the token takes a fee when it is moved, or moves less than it says: no deal can be made in it;"
    " use a network with another token"
)
_FROZEN: Final = (
    "the token's issuer has stopped this wallet or all transfers: only the issuer can change that"
)
_SIGNED: Final = (
    "the token does not take the wallet's signature: check name and version of its EIP-712 domain"
    " on this chain, or set funding to allowance in the network file"
)

BY_NAME: Final = {
    "WrongAmountReceived": _FEE,
    "ERC20InsufficientBalance": _POOR,
    "ERC20InsufficientAllowance": (
        "the token did not let the escrow take the money: is it paused, or does it want another"
        " kind of funding? See funding in the network file"
    ),
    "SafeERC20FailedOperation": (
        "the token refused to move the money and gave no reason: look at it in an explorer, or use"
        " a network with another token"
    ),
    "NotAToken": "there is no contract at the token's address on this chain: check the address",
    "TooLate": "its time has passed; by chain time, not by this machine's clock",
    "NonceUsed": "another offer of the same bargain was opened, or the seller withdrew this one",
}
"""By the names of our contracts and of OpenZeppelin's."""

# Tokens written before errors had names say it in words, each in its own; these are what USDC's
# code and OpenZeppelin's of that time say.
BY_WORDS: Final = (
    ("exceeds balance", _POOR),
    ("exceeds allowance", BY_NAME["ERC20InsufficientAllowance"]),
    ("blacklisted", _FROZEN),
    ("paused", _FROZEN),
    ("invalid signature", _SIGNED),
    ("invalidsignature", _SIGNED),
    ("erc2612invalidsigner", _SIGNED),
)


def advice(error: CallReverted) -> str:
    """Return what to do about a refusal, in a sentence; empty if nobody here knows."""
    known = BY_NAME.get(error.error)
    if known is not None:
        return known
    said = str(error).lower()
    return next((text for words, text in BY_WORDS if words in said), "")


def explained(error: CallReverted) -> str:
    """Return the refusal as the contract names it, with what to do about it where we know."""
    known = advice(error)
    return f"{error}: {known}" if known else str(error)
