"""Eve: hears everything on the network, and says what she should not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from coase.protocol.messages import (
    BODIES,
    CLOCK_SKEW_MAX_MS,
    ENVELOPE_LIFE_MAX_MS,
    ENVELOPE_SIZE_MAX_BYTES,
    Request,
)
from tests.simulation.cheap import CheapCodec, CheapIdentity

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.world import World

REMEMBERED_MAX = 300


class Eve:
    """A stranger on the network with keys of her own."""

    def __init__(self, world: World) -> None:
        self.world, self.rng = world, world.rng
        self.codec = CheapCodec(CheapIdentity("eve"), net="sim")
        self.abroad = CheapCodec(CheapIdentity("eve"), net="elsewhere")
        self.taped: list[tuple[str, bytes]] = []

    def see(self, to: str, wire: bytes) -> None:
        """Remember an envelope."""
        if len(self.taped) < REMEMBERED_MAX:
            self.taped.append((to, wire))
        else:
            self.taped[self.rng.randrange(REMEMBERED_MAX)] = (to, wire)

    def act(self) -> None:
        """Do one bad thing."""
        self.world.later(self.rng.randint(50, 1_500), self.act)
        if not self.taped:
            return
        to, wire = self.rng.choice(self.taped)
        node = self.world.by_address.get(to)
        if node is None or not node.up:
            return
        trick = self.rng.choice(
            (self._again, self._elsewhere, self._broken, self._rubbish, self._forged, self._flood)
        )
        trick(node, wire)

    def _again(self, node: Node, wire: bytes) -> None:
        """The same, later: it must be the same as if it came once."""
        node.hear(wire)

    def _elsewhere(self, node: Node, wire: bytes) -> None:
        """To somebody whom it was not for."""
        other = self.rng.choice(self.world.nodes)
        if other is not node and b'"kind":"request"' not in wire[:200]:
            self._unmoved(other, wire)

    def _broken(self, node: Node, wire: bytes) -> None:
        """Flipped, or cut off, or with something behind it."""
        at = self.rng.randrange(len(wire))
        match self.rng.randrange(3):
            case 0:
                wire = wire[:at] + bytes((wire[at] ^ 1 << self.rng.randrange(8),)) + wire[at + 1 :]
            case 1:
                wire = wire[:at]
            case _:
                wire += b" "
        self._unmoved(node, wire)

    def _rubbish(self, node: Node, wire: bytes) -> None:
        """Bytes that mean nothing, or far too many of them."""
        sizes = (0, 1, 65, 66, 1_000, ENVELOPE_SIZE_MAX_BYTES, ENVELOPE_SIZE_MAX_BYTES + 1)
        size = self.rng.choice(sizes)
        self._unmoved(node, self.rng.choice((self.rng.randbytes(size), b"{" * size, wire[:65])))

    def _forged(self, node: Node, wire: bytes) -> None:
        """Properly signed by Eve: about somebody else's deal, or at the wrong time or place."""
        head: dict[str, Any] = json.loads(wire[65:])
        now = self.world.now
        sent, expires = self.rng.choice(
            (
                (now, now + ENVELOPE_LIFE_MAX_MS),
                (now, now + 2 * ENVELOPE_LIFE_MAX_MS),
                (now + 3 * CLOCK_SKEW_MAX_MS, now + 4 * CLOCK_SKEW_MAX_MS),
                (now - ENVELOPE_LIFE_MAX_MS, now - 2 * CLOCK_SKEW_MAX_MS),
            )
        )
        codec = self.rng.choice((self.codec, self.codec, self.abroad))
        kinds = [kind for kind in BODIES if kind != "request"]
        forged = codec.encode(
            kind=self.rng.choice((*kinds, "unheardof")),
            message_id=self.rng.choice((head["id"], self.rng.randbytes(16).hex())),
            to=self.rng.choice((node.me, node.me, "*")),
            deal=head["deal"],
            re=self.rng.choice((head["id"], head["re"], "")),
            sent_ms=sent,
            expires_ms=expires,
            plain=self.rng.choice((b"{}", b"[1]", b'{"a":{"b":{}}}', b'"x"')),
            key="11" * 32,
        )
        self._unmoved(node, forged)

    def _flood(self, node: Node, wire: bytes) -> None:
        """Many requests at once, of which nothing comes."""
        now = self.world.now
        request = Request(
            capability=self.world.capability,
            schemas="0x" + self.world.schemas.hex(),
            task="0x" + "00" * 32,
            features={},
            chain_id=1,
            escrow=self.world.chain.domain.contract,
            asset=self.world.asset.token,
            settlements=["escrow"],
            verifications=["schema", "none"],
            arbiters=[],
            deliver_within_s=60,
            quality_min=0,
            input_max=0,
            output_max=0,
            model="",
            reply_by_ms=now + 1_000,
            bids_min=1,
            bids_max=1,
            key="22" * 32,
            firm="",
            vault="0x" + "00" * 20,
            stake_permille=0,
        )
        for _ in range(10):
            request_id = self.rng.randbytes(16).hex()
            flood = self.codec.encode(
                kind="request",
                message_id=request_id,
                to="*",
                deal=request_id,
                re="",
                sent_ms=now,
                expires_ms=now + 1_000,
                plain=request.model_dump_json().encode(),
                key="",
            )
            node.hear(flood)

    def _unmoved(self, node: Node, wire: bytes) -> None:
        """Let ``node`` hear it, and see that nothing of its deals changed."""
        before = dict(node.desk.threads)
        node.hear(wire)
        after = node.desk.threads
        same = before.keys() == after.keys() and all(before[d] is after[d] for d in before)
        self.world.require(same or not node.up, node, "was moved by what it should not believe")
