"""A disk that refuses: callers are told so in their API's words, and it goes on afterwards."""

from __future__ import annotations

import shutil
from collections import namedtuple
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest

from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.router import RouterCompute
from coase.agents.compute.ways import Place
from coase.agents.room import ROOM_MIN_BYTES
from coase.protocol.errors import JournalFailed
from coase.tools.cli import gateway_command
from coase.tools.gateway.server import Books, Doors, application, serving

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "one two"}]}
FULL = JournalFailed("the journal could not be written: the disk is full")
Usage = namedtuple("Usage", "total used free")


async def test_while_the_disk_refuses_it_says_so_and_then_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = 0
    free = 0
    told: list[str] = []

    async def once(*args: Any, as_json: bool) -> None:
        nonlocal lives
        lives += 1
        at = args[-1]
        if lives == 1:
            async with serving(application(RouterCompute(local=EchoCompute())), **PLACE) as at.url:
                at.port = int(at.url.rpartition(":")[2])
            raise ExceptionGroup("a node", [FULL])

    monkeypatch.setattr(gateway_command, "_once", once)
    monkeypatch.setattr(gateway_command, "ROOM_LOOK_S", 0.02)
    monkeypatch.setattr(gateway_command, "say", lambda text, **style: told.append(text))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(1, 1, free))
    at = gateway_command._At("127.0.0.1", 0)
    routing = gateway_command._Routing(tmp_path, Place.HERE)
    async with anyio.create_task_group() as group, httpx.AsyncClient() as web:

        async def serve() -> None:
            await gateway_command._serve(None, None, Doors(), routing, at, as_json=False)

        group.start_soon(serve)
        with anyio.fail_after(60):
            while not told:  # noqa: ASYNC110 - what is said has no event.
                await anyio.sleep(0.01)
            answer: httpx.Response | None = None
            while answer is None:
                try:
                    answer = await web.post(f"{at.url}/v1/messages", json=CHAT)
                except httpx.ConnectError:
                    await anyio.sleep(0.01)
            free = ROOM_MIN_BYTES
    assert answer is not None
    assert answer.status_code == 507
    assert answer.json()["type"] == "error"
    assert "the disk of the gateway is full" in answer.json()["error"]["message"]
    assert lives == 2


PLACE: Any = {"host": "127.0.0.1", "port": 0}


async def test_a_disk_that_refuses_from_the_beginning_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def once(*args: Any, as_json: bool) -> None:
        raise FULL

    monkeypatch.setattr(gateway_command, "_once", once)
    at = gateway_command._At("127.0.0.1", 0)
    routing = gateway_command._Routing(tmp_path, Place.HERE)
    with pytest.raises(JournalFailed):
        await gateway_command._serve(None, None, Doors(), routing, at, as_json=False)


@pytest.mark.parametrize(("trouble", "status"), [(FULL, 507), (None, 503)])
async def test_who_waits_when_it_ends_is_told_why(
    trouble: JournalFailed | None, status: int
) -> None:
    engine = EchoCompute(chunk_delay_s=3600)
    app = application(RouterCompute(local=engine), None, Books(trouble=lambda: trouble))
    answers: list[httpx.Response] = []
    async with httpx.AsyncClient() as web, anyio.create_task_group() as group:

        async def ask(url: str) -> None:
            answers.append(await web.post(f"{url}/api/chat", json=CHAT, timeout=None))

        async with serving(app, **PLACE) as url:
            group.start_soon(ask, url)
            with anyio.fail_after(60):
                while not engine._gate.inside:  # noqa: ASYNC110 - an engine has no event for it.
                    await anyio.sleep(0.01)
    assert answers[0].status_code == status
    assert isinstance(answers[0].json()["error"], str)


async def test_files_that_the_disk_refuses_are_no_fault_of_the_program() -> None:
    class Full(EchoCompute):
        async def models(self) -> Any:
            raise OSError(28, "No space left on device")

    app: Any = application(RouterCompute(local=Full()))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as web:
        answer = await web.get("/v1/models")
    assert answer.status_code == 507
