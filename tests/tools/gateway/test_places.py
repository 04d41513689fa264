"""Nobody shuts the others out: neither by many requests, nor by bodies that do not end."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest

from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.router import RouterCompute
from coase.tools.gateway import common, places
from coase.tools.gateway.places import NoPlace, Places
from coase.tools.gateway.server import Doors, application

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "one two"}]}
OPENAI = "/v1/chat/completions"


def test_of_all_places_a_caller_has_a_share_and_gives_it_back() -> None:
    all_ = Places(8)
    with ExitStack() as inside:
        for _ in range(6):
            all_.check("ann")
            inside.enter_context(all_.taken("ann"))
        with pytest.raises(NoPlace, match="6 requests of yours"):
            all_.check("ann")
        for _ in range(2):
            all_.check("bob")
            inside.enter_context(all_.taken("bob"))
        with pytest.raises(NoPlace, match="8 requests are"):
            all_.check("cid")
    all_.check("ann")
    Places(1).check("ann")


@pytest.mark.anyio
async def test_bodies_that_do_not_end_leave_a_place_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(common, "BODY_QUICK_S", 0.1)
    monkeypatch.setattr(places, "SLOW_BODIES_MAX", 2)
    app: Any = application(
        RouterCompute(local=EchoCompute()), Doors(concurrency=8, keys=("ann", "bob"))
    )
    answers: list[httpx.Response] = []
    two, over = anyio.Event(), anyio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await over.wait()
        yield b"}"

    async with (
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as web,
        anyio.create_task_group() as group,
    ):

        async def ask(key: str) -> None:
            headers = {"x-api-key": key}
            answers.append(await web.post(OPENAI, content=slow(), headers=headers))
            if len(answers) == 6:
                two.set()

        for _ in range(8):
            group.start_soon(ask, "ann")
        bob = await web.post(OPENAI, json=CHAT, headers={"x-api-key": "bob"})
        assert bob.status_code == 200
        with anyio.fail_after(60):
            await two.wait()
        # How many came in before the first was found slow is a matter of luck.
        assert {answer.status_code for answer in answers} <= {408, 429}
        said = [answer.text for answer in answers if answer.status_code == 408]
        assert "2 other requests of yours are as slow" in said[0]
        over.set()
    assert [answer.status_code for answer in answers[6:]] == [400, 400]
