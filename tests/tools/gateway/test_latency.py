"""What would cost every token or answer some milliseconds, and no test of content sees."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from coase.agents.compute.openai import OpenAICompute
from coase.agents.compute.ports import Prompt
from coase.tools.gateway.server import _listen, serving
from tests.bench.backend import application

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


def test_parts_of_an_answer_are_sent_at_once() -> None:
    """Asyncio turns Nagle's algorithm off only where the socket says that it speaks TCP."""
    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


@pytest.mark.anyio
async def test_one_connection_to_an_engine_serves_one_prompt_after_the_other() -> None:
    app, seen = application(gap_ms=0), set[object]()

    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        seen.add(scope["client"])
        await app(scope, receive, send)

    async with serving(noted, host="127.0.0.1", port=0) as url:
        compute = OpenAICompute(f"{url}/v1")
        for _ in range(3):
            answer = await compute.complete(Prompt.ask("Count.", model="fixed", max_tokens=4))
            assert answer.text == "word " * 4
        await compute.close()
    assert len(seen) == 1
