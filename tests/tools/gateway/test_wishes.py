"""What a request may wish of the router, and that its answer says where to read why."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest
from typer.testing import CliRunner

from coase.agents.compute.calllog import CallLog
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.explain import Attempt, Explanation
from coase.agents.compute.router import RouterCompute
from coase.agents.compute.routing import Wish
from coase.agents.compute.ways import Place
from coase.tools.gateway.server import application
from coase.tools.gateway.usage import USAGE_FILE, UsageJournal
from coase.tools.gateway.wishes import BadWish, wish_of
from tests.tools.commands import command

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

ASKED: Any = [{"role": "user", "content": "one two three"}]
BODIES: Any = {
    "/v1/chat/completions": {"model": "echo", "messages": ASKED},
    "/v1/messages": {"model": "echo", "max_tokens": 9, "messages": ASKED},
    "/api/chat": {"model": "echo", "stream": False, "messages": ASKED},
    "/api/generate": {"model": "echo", "stream": False, "prompt": "one two three"},
}


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[RouterCompute]:
    with closing(CallLog(tmp_path)) as calls:
        yield RouterCompute(local=EchoCompute(), calls=calls)


@asynccontextmanager
async def asking(router: RouterCompute) -> AsyncIterator[httpx.AsyncClient]:
    app: Any = application(router)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_names_its_call_and_explain_tells_of_it(tmp_path: Path, path: str) -> None:
    async def asked() -> httpx.Response:
        with closing(CallLog(tmp_path)) as calls:
            async with asking(RouterCompute(local=EchoCompute(), calls=calls)) as client:
                return await client.post(path, json=BODIES[path])

    answer = anyio.run(asked)
    assert answer.status_code == 200
    call = answer.headers["x-coase-call"]
    told = answer.json()["coase"]
    assert told["call"] == call
    assert told["explanation"]["why"] == "the least expected cost"
    assert told["explanation"]["attempts"][0]["seller"] == "here"
    run = CliRunner().invoke(command(), ["explain", call[:8], "--state", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert f"call {call}: echo" in run.output
    assert "1. the engine here with echo: answered" in run.output
    run = CliRunner().invoke(command(), ["explain", call, "--state", str(tmp_path), "--json"])
    assert json.loads(run.output)["outcome"] == "answered"


async def test_a_stream_names_its_call_before_its_first_word(router: RouterCompute) -> None:
    body = BODIES["/v1/chat/completions"] | {"stream": True}
    async with asking(router) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    events = [
        json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: {")
    ]
    last = next(event["coase"] for event in events if "coase" in event)
    assert answer.headers["x-coase-call"] == last["call"]
    assert last["explanation"]["outcome"] == "answered"


async def test_models_beside_the_first_are_tried_in_every_way_to_say_so(
    router: RouterCompute,
) -> None:
    body = BODIES["/v1/chat/completions"] | {"model": "missing"}
    async with asking(router) as client:
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 404
        for more, headers in (
            ({"models": ["gone", "echo"]}, {}),
            ({"coase": {"models": ["echo"]}}, {}),
            ({}, {"x-coase-models": "gone, echo"}),
        ):
            answer = await client.post("/v1/chat/completions", json=body | more, headers=headers)
            assert answer.status_code == 200, (more, headers, answer.text)
            assert answer.json()["choices"][0]["message"]["content"] == "one two three"


@pytest.mark.parametrize("path", BODIES)
async def test_a_wish_that_nothing_here_meets_is_refused_with_its_reason(
    router: RouterCompute, path: str
) -> None:
    async with asking(router) as client:
        wish = {"coase": {"ban": ["here"]}}
        answer = await client.post(path, json=BODIES[path] | wish)
        assert answer.status_code == 400
        assert "1 banned" in answer.text
        answer = await client.post(path, json=BODIES[path] | {"coase": {"data": "moon"}})
        assert answer.status_code == 400
        assert "coase.data" in answer.text
        answer = await client.post(path, json=BODIES[path] | {"coase": {"ban": []}})
        assert answer.status_code == 200


def test_every_field_reaches_the_wish_and_the_body_is_before_the_headers() -> None:
    router = RouterCompute(local=EchoCompute())
    headers = {"x-coase-data": "firm", "x-coase-sellers": "a, b", "x-coase-deadline-s": "2.5"}
    body = {"coase": {"data": "here", "regions": ["eu"], "quantisations": ["Q4_0"]}}
    assert wish_of(body, headers, router) == Wish(
        reach=Place.HERE,
        sellers=frozenset({"a", "b"}),
        regions=frozenset({"eu"}),
        quantisations=frozenset({"Q4_0"}),
        deadline_ms=2_500,
    )
    assert wish_of({"model": "x"}, {"accept": "y"}, router) is None


@pytest.mark.parametrize(
    "wish",
    [
        5,
        {"budget": "1"},
        {"models": "a" * 201},
        {"models": [1]},
        {"sellers": {"a": 1}},
        {"ban": ["x"] * 65},
        {"data": 5},
        {"max_price": 0.01},
        {"deadline_s": 0},
        {"deadline_s": "soon"},
        {"deadline_s": True},
        {"deadline_s": 1e9},
    ],
)
def test_a_wish_that_cannot_be_read_is_none(wish: Any) -> None:
    with pytest.raises(BadWish, match=r"^coase"):
        wish_of({"coase": wish}, {}, RouterCompute(local=EchoCompute()))


def test_explain_says_what_to_do_where_nothing_is_kept(tmp_path: Path) -> None:
    runner = CliRunner()
    run = runner.invoke(command(), ["explain", "--state", str(tmp_path)])
    assert (run.exit_code, "no call was answered yet" in run.output) == (0, True)
    run = runner.invoke(command(), ["explain", "abc", "--state", str(tmp_path)])
    assert run.exit_code == 2
    CallLog(tmp_path).close()
    run = runner.invoke(command(), ["explain", "abc", "--state", str(tmp_path)])
    assert run.exit_code == 2
    run = runner.invoke(command(), ["explain", "--state", str(tmp_path), "--json"])
    assert json.loads(run.output) == []


def test_explain_tells_what_a_deal_cost_that_was_open_when_the_answer_was_there(
    tmp_path: Path,
) -> None:
    tried = [
        Attempt(
            seller="0x1",
            place=Place.MARKET,
            model="m",
            outcome="answered",
            deal=deal,
            price_units=1_500,
            paid_units=None,
        )
        for deal in ("ab", "cd")
    ]
    with closing(CallLog(tmp_path)) as calls:
        calls.keep(
            Explanation(call="one", at_ms=1, attempts=tuple(tried), symbol="COASE", decimals=6)
        )
    runner = CliRunner()
    with closing(UsageJournal(tmp_path)) as usage:
        row: Any = ("one", 1, "", "0x1", "m", "1500")
        usage._deals([("xy", "two", 1, "", "0x1", "m", "7", "7", "COASE", 6)])
        usage._deals([("ab", *row, "900", "COASE", 6), ("cd", *row, None, "COASE", 6)])
        run = runner.invoke(command(), ["explain", "one", "--state", str(tmp_path)])
        assert "it cost 0.0009 COASE, and at most 0.0015 COASE more, which is not" in run.stdout
        usage._deals([("cd", *row, "0", "COASE", 6)])
    run = runner.invoke(command(), ["explain", "--state", str(tmp_path), "--json"])
    (found,) = json.loads(run.stdout)
    assert (found["paid"], found["open"], found["paid_units"]) == ("0.0009 COASE", "", "900")
    with closing(UsageJournal(tmp_path)) as usage:  # One that went on without a reader.
        usage._deals([("ef", *row, "200", "COASE", 6)])
    run = runner.invoke(command(), ["explain", "one", "--state", str(tmp_path)])
    assert "it cost 0.0011 COASE\n" in run.stdout
    assert "3. 0x1 with m: broken off" in run.stdout
    (tmp_path / USAGE_FILE).write_bytes(b"broken " * 99)
    run = runner.invoke(command(), ["explain", "one", "--state", str(tmp_path)])
    assert "it cost 0 COASE, and at most 0.003 COASE more" in run.stdout
