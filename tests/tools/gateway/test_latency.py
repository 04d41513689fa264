"""What would cost every token of every answer some milliseconds, and no test of content sees."""

from __future__ import annotations

import socket

from coase.tools.gateway.server import _listen


def test_parts_of_an_answer_are_sent_at_once() -> None:
    """Asyncio turns Nagle's algorithm off only where the socket says that it speaks TCP."""
    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
