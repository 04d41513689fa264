"""Names of subjects on the broker, and the shards that keep a request cheap.

An inbox is ``coase.v1.<net>.inbox.<address without 0x>``. A request goes to
``coase.v1.<net>.req.<capability>.<level>.<prefix>``, where the prefix is the first ``level``
bits of keccak256 of the seller's 20 address bytes, in hex, or ``-`` at level 0. Each seller
listens at every level, so a buyer chooses how many of them hear it: 1 in 2**level. A seller
also listens to the bare names of what it sells and to ``any``, where it can be asked to describe
itself.

Brokers of several machines that are joined carry three more: ``coase.v1.<net>.chain.rpc``, where
the machine that holds the chain answers JSON-RPC, ``coase.v1.<net>.lan.card`` and ``.lan.hello``,
where a newcomer learns what the network is and who is there. There ``<net>`` is the name of the
mesh, since a newcomer does not know the network's yet.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal

from .errors import ConfigurationError, LocalProtocolError
from .identity import keccak256

if TYPE_CHECKING:
    from .types import AgentId

LEVELS: Final = (0, 4, 8, 12)
"""Bits of a shard's prefix; whole hex digits. At 12, 100,000 sellers are about 24 a shard."""

WHOLE: Final = "-"
"""The prefix at level 0: an empty token is no subject."""

LanQuestion = Literal["card", "hello", "view"]
"""What is asked of machines: the network's card, a sign of life, what one sees of the others."""

_ROOT: Final = "coase.v1"
_BITS_PER_DIGIT: Final = 4
_NET: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_CAPABILITY: Final = re.compile(r"[a-z][a-z0-9-]{0,31}(-[0-9a-f]{8})?")
_NODE: Final = re.compile(r"[0-9a-f]{16}")
_ADDRESS: Final = re.compile(r"0x[0-9a-f]{40}")
_PREFIX: Final = re.compile(r"[0-9a-f]{1,3}")


def require_net(net: str) -> str:
    """Return ``net`` if it may be part of a subject.

    :raises ConfigurationError: otherwise; a dot or a wildcard would reach other networks
    """
    if not _NET.fullmatch(net):
        raise ConfigurationError(
            f"{net!r} is no name of a network: use 1 to 32 of a-z, 0-9 and '-', not '-' first"
        )
    return net


@lru_cache(maxsize=8192)
def inbox_subject(net: str, agent: AgentId) -> str:
    """Return the subject on which ``agent`` hears what is sent to it alone.

    :raises ConfigurationError: if ``net`` is no name of a network
    :raises LocalProtocolError: if ``agent`` is no lower-case address
    """
    return f"{_ROOT}.{require_net(net)}.inbox.{_require_address(agent)[2:]}"


@lru_cache(maxsize=8192)
def request_subject(net: str, capability: str, level: int, prefix: str) -> str:
    """Return the subject on which the sellers of ``capability`` in one shard hear requests.

    :raises ConfigurationError: if ``net`` or ``capability`` cannot be part of a subject
    :raises LocalProtocolError: if ``prefix`` is not one of ``level``
    """
    if not _CAPABILITY.fullmatch(capability):
        raise ConfigurationError(
            f"{capability!r} is no capability: it is '<name>-<8 hex digits of its schemas>',"
            " or a name alone where it is only to be described"
        )
    _require_level(level)
    fits = len(prefix) == level // _BITS_PER_DIGIT and _PREFIX.fullmatch(prefix)
    if not (prefix == WHOLE if level == 0 else fits):
        raise LocalProtocolError(f"{prefix!r} is no prefix of {level} bits")
    return f"{_ROOT}.{require_net(net)}.req.{capability}.{level}.{prefix}"


@lru_cache(maxsize=8192)
def prefixes(agent: AgentId) -> tuple[tuple[int, str], ...]:
    """Return ``(level, prefix)`` of each shard that ``agent`` lies in, widest first.

    :raises LocalProtocolError: if ``agent`` is no lower-case address
    """
    digits = keccak256(bytes.fromhex(_require_address(agent)[2:])).hex()
    return tuple((level, digits[: level // _BITS_PER_DIGIT] or WHOLE) for level in LEVELS)


def served_subjects(net: str, capability: str, agent: AgentId) -> tuple[str, ...]:
    """Return every subject on which ``agent`` hears requests for ``capability``."""
    return tuple(
        request_subject(net, capability, level, prefix) for level, prefix in prefixes(agent)
    )


def chain_subject(net: str) -> str:
    """Return the subject on which the machine that holds the chain answers JSON-RPC.

    :raises ConfigurationError: if ``net`` is no name of a network
    """
    return f"{_ROOT}.{require_net(net)}.chain.rpc"


def lan_subject(mesh: str, what: LanQuestion, *, node: str = "") -> str:
    """Return the subject of a question to the machines of a mesh, or to one of them.

    :raises ConfigurationError: if ``mesh`` is no name of a network
    :raises LocalProtocolError: if ``node`` is no id of a machine
    """
    if node and not _NODE.fullmatch(node):
        raise LocalProtocolError(f"{node!r} is no id of a machine: 16 lower-case hex digits")
    return f"{_ROOT}.{require_net(mesh)}.lan.{what}" + (f".{node}" if node else "")


def prefix_from(chance: int, *, level: int) -> str:
    """Return the prefix that the integer ``chance`` (of any size, not negative) picks.

    All prefixes of the level are equally likely if ``chance`` is uniform below 2**12 or more.

    :raises LocalProtocolError: if there is no such level, or ``chance`` is negative
    """
    _require_level(level)
    if chance < 0:
        raise LocalProtocolError("chance is an integer from 0 upwards")
    return f"{chance % 2**level:0{level // _BITS_PER_DIGIT}x}" if level else WHOLE


def level_above(level: int) -> int | None:
    """Return the next wider level, 16 times as many sellers, or None when all were asked.

    :raises LocalProtocolError: if there is no such level
    """
    index = LEVELS.index(_require_level(level))
    return LEVELS[index - 1] if index else None


def _require_level(level: int) -> int:
    if level not in LEVELS:
        raise LocalProtocolError(f"{level} is no level of a shard: they are {LEVELS}")
    return level


def _require_address(agent: AgentId) -> AgentId:
    if not _ADDRESS.fullmatch(agent):
        raise LocalProtocolError(f"{agent!r} is no address: 0x and 40 lower-case hex digits")
    return agent
