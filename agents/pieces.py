"""Bodies too large for one envelope: cut into pieces, put together again.

A piece is an envelope of kind ``piece`` whose sealed bytes are a small JSON head, a line feed
and a slice of the body. All pieces carry the hash of the whole body, so that they cannot be
mixed, and each is acknowledged for itself, so that only what was lost is repeated. They are kept
in memory until the whole is there and goes to the journal.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from coase.protocol.errors import LocalProtocolError, Refused
from coase.protocol.identity import keccak256
from coase.protocol.messages import (
    BODY_INLINE_MAX_BYTES,
    BODY_SIZE_MAX_BYTES,
    PIECE_SIZE_MAX_BYTES,
    PIECES_MAX,
    SCHEMA_MAX_CHARS,
    Header,
    Piece,
)

if TYPE_CHECKING:
    from coase.protocol.envelope import Message

# Bodies being put together at one time, one for each sender and deal. The oldest of whoever has
# most of them gives way.
PARTIAL_MAX: Final = 64
WHOLES_MAX: Final = 8 * PIECES_MAX  # Pieces of finished bodies remembered; about 1 MB.
PARTIAL_MAX_BYTES: Final = 2 * BODY_SIZE_MAX_BYTES
PARTIAL_AGE_MAX_MS: Final = 600_000
_HEAD_MAX_BYTES: Final = 256
# What a seller takes on it must be able to show to an arbiter, in one body: both schemas, the
# terms, the task and its result.
SHOWN_MAX_BYTES: Final = BODY_SIZE_MAX_BYTES - PIECES_MAX * 512 - 8 * SCHEMA_MAX_CHARS
TASK_SIZE_MAX_BYTES: Final = SHOWN_MAX_BYTES // 2
TASK_HEAD_MAX_BYTES: Final = 256  # Of the message around a task: its salt, the names of fields.


@dataclass(frozen=True, slots=True)
class Slice:
    """One piece, ready to be sealed."""

    id: str
    seq: int
    plain: bytes


@dataclass(frozen=True, slots=True)
class Whole:
    """A body put together, with the header that a single envelope would have had."""

    header: Header
    plain: bytes
    count: int


def split(message: Message) -> list[Slice] | None:
    """Return the pieces of ``message``, or None if it fits one envelope.

    :raises LocalProtocolError: if the body is larger than all pieces together may be
    """
    plain = message.plain
    if len(plain) <= BODY_INLINE_MAX_BYTES:
        return None
    room = PIECE_SIZE_MAX_BYTES - _HEAD_MAX_BYTES
    count = -(-len(plain) // room)
    if count > PIECES_MAX:
        raise LocalProtocolError(
            f"the body of {message.kind} has {len(plain)} bytes; {room * PIECES_MAX} are allowed"
        )
    content = keccak256(plain)
    head = json.dumps(
        {
            "message": message.id,
            "kind": message.kind,
            "count": count,
            "content": "0x" + content.hex(),
        },
        separators=(",", ":"),
    ).encode()
    return [
        Slice(
            id=piece_id(message.id, seq),
            seq=seq,
            plain=head + b"\n" + plain[seq * room : (seq + 1) * room],
        )
        for seq in range(count)
    ]


def size_as_json(*texts: str) -> int:
    """Return the bytes of ``texts`` as JSON, which is how they travel."""
    return sum(len(json.dumps(text, ensure_ascii=False).encode()) for text in texts)


def piece_id(message_id: str, seq: int) -> str:
    """Return the id of one piece: the same each time, so that a repetition is known as such."""
    return keccak256(b"coase/piece/v1\0" + bytes.fromhex(message_id) + seq.to_bytes(4, "big"))[
        :16
    ].hex()


@dataclass(slots=True)
class _Partial:
    content: bytes
    message: str
    kind: str
    count: int
    started_ms: int
    slices: dict[int, bytes] = field(default_factory=dict)
    size: int = 0


class Pieces:
    """Puts bodies together. Bounded in number, size and age, whatever comes in."""

    def __init__(self) -> None:
        self._partial: dict[tuple[str, str], _Partial] = {}
        self._wholes: OrderedDict[tuple[str, str], str] = OrderedDict()

    def whole_of(self, sender: str, carrier: str) -> str:
        """Return the id of the message of which the piece ``carrier`` was part, once whole."""
        return self._wholes.get((sender, carrier), "")

    def add(self, header: Header, plain: bytes, *, now_ms: int) -> Whole | None:
        """Take one piece; return the whole message once the last one is there.

        :raises Refused: ``malformed`` or ``too_large``
        """
        head, _, data = plain.partition(b"\n")
        try:
            piece = Piece.model_validate_json(head)
        except ValidationError:
            raise Refused("malformed", "the head of a piece") from None
        if header.seq >= piece.count or len(data) > PIECE_SIZE_MAX_BYTES:
            raise Refused("malformed", "a piece beyond its count or size")
        if header.id != piece_id(piece.message, header.seq):
            raise Refused("malformed", "the id of a piece does not follow from its message")
        content = bytes.fromhex(piece.content[2:])
        key = (header.sender, header.deal)
        partial = self._partial.get(key)
        if partial is None or partial.content != content:
            self._partial.pop(key, None)
            self._make_room(now_ms=now_ms)
            partial = _Partial(content, piece.message, piece.kind, piece.count, now_ms)
            self._partial[key] = partial
        if (partial.message, partial.kind, partial.count) != (
            piece.message,
            piece.kind,
            piece.count,
        ):
            raise Refused("malformed", "pieces of one body that disagree")
        if header.seq not in partial.slices:
            partial.slices[header.seq] = data
            partial.size += len(data)
        if self._size() > PARTIAL_MAX_BYTES:
            del self._partial[key]
            raise Refused("too_large", "too many unfinished bodies")
        if len(partial.slices) < partial.count:
            return None
        del self._partial[key]
        body = b"".join(partial.slices[seq] for seq in range(partial.count))
        if keccak256(body) != content:
            raise Refused("malformed", "the pieces are not the body that they announced")
        for seq in range(partial.count):
            self._wholes[(header.sender, piece_id(piece.message, seq))] = piece.message
        while len(self._wholes) > WHOLES_MAX:
            self._wholes.popitem(last=False)
        # It goes on under the message's own id: that is what its sender waits to see answered.
        whole = header.model_copy(
            update={"kind": partial.kind, "id": piece.message, "seq": 0, "body": ""}
        )
        return Whole(whole, body, partial.count)

    def _size(self) -> int:
        return sum(partial.size for partial in self._partial.values())

    def _make_room(self, *, now_ms: int) -> None:
        old = [
            key
            for key, partial in self._partial.items()
            if now_ms - partial.started_ms > PARTIAL_AGE_MAX_MS
        ]
        for key in old:
            del self._partial[key]
        while len(self._partial) >= PARTIAL_MAX:
            most, _ = Counter(sender for sender, _ in self._partial).most_common(1)[0]
            del self._partial[next(key for key in self._partial if key[0] == most)]
