"""k of n arbiters as one: where their panel is, whose signatures count, and how they share the fee.

A panel's address follows from its threshold and its members, so terms can name it as their arbiter
before anything is there; it is put on the chain when a dispute needs it. This is the Python twin of
the panel contract and of the factory that deploys it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import CallReverted
from coase.protocol.identity import keccak256
from coase.protocol.terms import word
from coase.protocol.types import ZERO_ADDRESS

from .lifecycle import Payout, Verify, is_signed_by

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from coase.protocol.effects import Rule
    from coase.protocol.types import AgentId

MEMBERS_MAX: Final = 16
"""Each member costs a signature in the calldata of a ruling."""

# The minimal proxy of ERC-1167 with data behind its code: what runs, and what deploys that.
_PROXY_HEAD: Final = bytes.fromhex("363d3d373d3d3d363d73")
_PROXY_TAIL: Final = bytes.fromhex("5af43d82803e903d91602b57fd5bf3")
_PROXY_SIZE_BYTES: Final = len(_PROXY_HEAD) + 20 + len(_PROXY_TAIL)
_DEPLOY_HEAD: Final = b"\x61"
_DEPLOY_TAIL: Final = bytes.fromhex("3d81600a3d39f3")
_SALT: Final = bytes(32)


@dataclass(frozen=True, slots=True)
class Constitution:
    """Who the members are, by ascending address, and how many must agree. Make it with ``of``."""

    threshold: int
    members: tuple[AgentId, ...]

    @classmethod
    def of(cls, threshold: int, members: Iterable[AgentId]) -> Constitution:
        """Return the constitution of these members, in whatever order they come.

        :raises CallReverted: BadThreshold, NotAscending; the factory would say the same
        """
        ordered = tuple(sorted(members))
        if not 0 < threshold <= len(ordered) <= MEMBERS_MAX:
            raise CallReverted("BadThreshold", threshold, len(ordered))
        for earlier, later in zip((ZERO_ADDRESS, *ordered), ordered, strict=False):
            if later <= earlier:
                raise CallReverted("NotAscending", later)
        return cls(threshold, ordered)

    def address(self, *, factory: str, code: str) -> AgentId:
        """Return where the panel is or will be; ``code`` is the contract that all panels share."""
        data = b"".join(
            (
                word(self.threshold),
                word(64),  # Where the members begin.
                word(len(self.members)),
                *(word(int(member, 16)) for member in self.members),
            )
        )
        runtime = _PROXY_HEAD + bytes.fromhex(code[2:]) + _PROXY_TAIL + data
        size = (_PROXY_SIZE_BYTES + len(data)).to_bytes(2, "big")
        creation = _DEPLOY_HEAD + size + _DEPLOY_TAIL + runtime
        place = b"\xff" + bytes.fromhex(factory[2:]) + _SALT + keccak256(creation)
        return "0x" + keccak256(place)[12:].hex()

    def places(self, signatures: Mapping[AgentId, bytes]) -> tuple[bytes, ...]:
        """Return one signature for each member, in their order, empty where there is none."""
        return tuple(signatures.get(member, b"") for member in self.members)


@dataclass(frozen=True, slots=True)
class PanelRule:
    """Rule as a panel; ``signatures`` has one place for each member, empty where none signed."""

    ruling: Rule
    signatures: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class WithdrawFee:
    """Pay out what a failed transfer left with the panel for ``owner``. Anybody may send it."""

    owner: AgentId


PanelCall = PanelRule | WithdrawFee


def signers_of(
    constitution: Constitution,
    digest: bytes,
    signatures: Sequence[bytes],
    *,
    caller: str,
    verify: Verify = is_signed_by,
) -> tuple[AgentId, ...]:
    """Return the members who signed ``digest``, in their order. A calling member has signed.

    :raises CallReverted: WrongCount, BadSignature, TooFew
    """
    members = constitution.members
    if len(signatures) != len(members):
        raise CallReverted("WrongCount", len(signatures), len(members))
    signers = []
    for member, signature in zip(members, signatures, strict=True):
        if member != caller:
            if not signature:
                continue
            if not verify(digest, signature, member):
                raise CallReverted("BadSignature", member)
        signers.append(member)
    if len(signers) < constitution.threshold:
        raise CallReverted("TooFew", len(signers), constitution.threshold)
    return tuple(signers)


def fee_shares(fee_units: int, signers: Sequence[AgentId]) -> tuple[Payout, ...]:
    """Return what each signer gets of the fee: equal parts, and the dust to the first."""
    part, dust = divmod(fee_units, len(signers))
    shares = (Payout(signer, part + (0 if i else dust)) for i, signer in enumerate(signers))
    return tuple(share for share in shares if share.units)
