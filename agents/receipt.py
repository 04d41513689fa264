"""One receipt for work in many parts: what each part was, from whom, for how much.

Its root commits to all parts at once. Whoever holds a part and its path can be shown that it
belongs to the receipt without seeing the others; task and result are committed to with a salt of
their own, so that short ones cannot be guessed from their hashes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, TypeAdapter, ValidationError

from coase.protocol.errors import BadSignature, RemoteProtocolError
from coase.protocol.identity import keccak256, require_signer
from coase.protocol.messages import canonical_json, commitment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coase.protocol.identity import Identity

DOMAIN: Final = b"coase/plan-receipt/v1\0"
PARTS_MAX: Final = 100_000  # Ten thousand times what a person reads; a tree of 17 levels.
SALT_BYTES: Final = 32
# A leaf can never be taken for an inner node, which would let parts be forged out of hashes.
_LEAF, _NODE = b"\0", b"\1"


class ReceiptWrong(RemoteProtocolError):
    """A receipt that does not say what it commits to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One piece of work, as far as it was paid for or used."""

    key: str
    """Which piece it is; within one plan no two have the same key."""
    seller: str
    """An address, or the name of the engine that made it here."""
    deal: str = ""
    """Empty for what was not bought."""
    task_hash: str
    result_hash: str = ""
    """Empty if there was no result, and the price may be lost all the same."""
    price_units: int = 0
    """What was paid; the highest price while that is open."""
    used: bool = True
    """False for what was bought beside the one that was used, as a late answer is."""

    def leaf(self) -> bytes:
        """Return the hash of everything that it says."""
        return keccak256(_LEAF + canonical_json(_wire(self)).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a plan bought and made, in the order of its keys."""

    plan: str
    asset: str
    """Chain and token in which prices are counted, empty where nothing was bought."""
    pieces: int
    """How many pieces the plan had; those without a part were not made."""
    parts: tuple[Part, ...]
    root: str
    signer: str = ""
    signature: str = ""
    salt: str = ""
    """Opens the hashes of tasks and results; kept by whoever asked, see ``public``."""

    @property
    def total_units(self) -> int:
        """What all parts cost."""
        return sum(part.price_units for part in self.parts)

    def public(self) -> Receipt:
        """Return it without what opens the hashes, to be shown to others."""
        return replace(self, salt="")

    def to_json(self) -> str:
        """Return it as text that ``from_json`` reads."""
        return canonical_json(_document(self))

    @classmethod
    def from_json(cls, text: str) -> Receipt:
        """Return the receipt that a text spells; whether it is right, ``check`` tells.

        :raises ReceiptWrong: if it is none
        """
        try:
            return _READER.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(step) for step in first["loc"]) or "document"
            raise ReceiptWrong(f"this is no receipt: {where}: {first['msg']}") from None

    def check(
        self,
        *,
        tasks: Mapping[str, object] | None = None,
        results: Mapping[str, object] | None = None,
    ) -> None:
        """Return if the root commits to exactly these parts, and its signature is the signer's.

        ``tasks`` and ``results``, by key, are held against their hashes as well.

        :raises ReceiptWrong: with what does not fit
        """
        if not 0 <= len(self.parts) <= PARTS_MAX:
            raise ReceiptWrong(f"it has over {PARTS_MAX} parts")
        keys = [part.key for part in self.parts]
        if keys != sorted(set(keys)):
            raise ReceiptWrong("its parts are not in order, or one is there twice")
        deals = [part.deal for part in self.parts if part.deal]
        if len(set(deals)) != len(deals):
            raise ReceiptWrong("one deal pays for two parts")
        if any(part.price_units < 0 for part in self.parts):
            raise ReceiptWrong("a part has a price below nothing")
        if _root(self.plan, self.asset, self.pieces, self.parts) != self.root:
            raise ReceiptWrong("its root does not commit to these parts")
        self._check_signature()
        for given, field in ((tasks, "task_hash"), (results, "result_hash")):
            for key, value in (given or {}).items():
                self._check_hash(key, value, field)

    def _check_signature(self) -> None:
        if not self.signer and not self.signature:
            return
        try:
            signature = bytes.fromhex(self.signature.removeprefix("0x"))
            require_signer(bytes.fromhex(self.root[2:]), signature, self.signer)
        except (ValueError, BadSignature) as error:
            raise ReceiptWrong(f"its signature is not that of {self.signer}: {error}") from None

    def _check_hash(self, key: str, value: object, field: str) -> None:
        if not self.salt:
            raise ReceiptWrong("without its salt, tasks and results cannot be held against it")
        found = next((part for part in self.parts if part.key == key), None)
        if found is None:
            raise ReceiptWrong(f"it has no part {key!r}")
        if getattr(found, field) != content_hash(bytes.fromhex(self.salt), key, value):
            raise ReceiptWrong(f"the {field.partition('_')[0]} of part {key!r} was another one")

    def path(self, key: str) -> tuple[str, ...]:
        """Return what proves that the part with this key belongs to the receipt.

        :raises ReceiptWrong: if there is no such part
        """
        index = next((n for n, part in enumerate(self.parts) if part.key == key), None)
        if index is None:
            raise ReceiptWrong(f"it has no part {key!r}")
        level = [part.leaf() for part in self.parts]
        steps = []
        while len(level) > 1:
            beside = index ^ 1
            if beside < len(level):
                side = "<" if beside < index else ">"
                steps.append(side + level[beside].hex())
            level, index = _above(level), index // 2
        head = _head(self.plan, self.asset, self.pieces, len(self.parts))
        return (*steps, "=" + head.hex())


_READER: Final = TypeAdapter(Receipt)


def belongs(part: Part, path: Sequence[str], *, root: str) -> bool:
    """Return whether ``part`` is one of those that ``root`` commits to, as its path shows."""
    now = part.leaf()
    try:
        for step in path:
            other = bytes.fromhex(step[1:])
            match step[:1]:
                case "<":
                    now = keccak256(_NODE + other + now)
                case ">":
                    now = keccak256(_NODE + now + other)
                case "=":
                    now = keccak256(DOMAIN + other + now)
                case _:
                    return False
    except ValueError:
        return False
    return bool(path) and path[-1].startswith("=") and f"0x{now.hex()}" == root


def make_receipt(
    plan: str,
    parts: Sequence[Part],
    *,
    pieces: int,
    asset: str = "",
    salt: bytes = b"",
    identity: Identity | None = None,
) -> Receipt:
    """Return the receipt for ``parts``, signed if there is an identity to sign it."""
    ordered = tuple(sorted(parts, key=lambda part: part.key))
    root = _root(plan, asset, pieces, ordered)
    signature = identity.sign(bytes.fromhex(root[2:])) if identity is not None else b""
    return Receipt(
        plan=plan,
        asset=asset,
        pieces=pieces,
        parts=ordered,
        root=root,
        signer=identity.address if identity is not None else "",
        signature=f"0x{signature.hex()}" if signature else "",
        salt=salt.hex(),
    )


def content_hash(salt: bytes, key: str, value: object) -> str:
    """Return what a receipt keeps of a task or a result: its hash with the part's own salt."""
    own = keccak256(salt + key.encode())
    return f"0x{commitment(own, spelt(value).encode()).hex()}"


def spelt(value: object) -> str:
    """Return the one spelling of a task or a result: text as it is, all else as canonical JSON."""
    return value if isinstance(value, str) else canonical_json(_plain(value))


def _plain(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, bytes):
        return f"0x{value.hex()}"
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return value


def _wire(part: Part) -> dict[str, object]:
    return {**asdict(part), "price_units": str(part.price_units)}


def _document(receipt: Receipt) -> dict[str, object]:
    row = {field.name: getattr(receipt, field.name) for field in fields(receipt)}
    return {**row, "parts": [_wire(part) for part in receipt.parts]}


def _root(plan: str, asset: str, pieces: int, parts: Sequence[Part]) -> str:
    level = [part.leaf() for part in parts] or [keccak256(_LEAF)]
    while len(level) > 1:
        level = _above(level)
    return f"0x{keccak256(DOMAIN + _head(plan, asset, pieces, len(parts)) + level[0]).hex()}"


def _head(plan: str, asset: str, pieces: int, count: int) -> bytes:
    head = {"plan": plan, "asset": asset, "pieces": pieces, "parts": count}
    return keccak256(canonical_json(head).encode())


def _above(level: list[bytes]) -> list[bytes]:
    """Return the next level of the tree; one that has no neighbour goes up as it is."""
    pairs = [level[start : start + 2] for start in range(0, len(level), 2)]
    return [keccak256(_NODE + b"".join(pair)) if len(pair) == 2 else pair[0] for pair in pairs]
