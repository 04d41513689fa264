"""Keys with budgets, what was used by whom, and who is let in: over the real application."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest

from coase.agents import Agent, Budget, Price
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.gate import Limits
from coase.agents.compute.market import MarketCompute
from coase.agents.compute.ports import ModelInfo
from coase.agents.compute.router import RouterCompute
from coase.agents.firm import FirmFile, new_firm
from coase.agents.inference import Stock, inference_agent
from coase.agents.purse import rows_of
from coase.agents.seller import Windows
from coase.agents.steps import Notice
from coase.protocol.errors import ConfigurationError
from coase.tools.gateway import calls
from coase.tools.gateway.calls import Till
from coase.tools.gateway.keys import KEYS_FILE, PREFIX, KeyFile
from coase.tools.gateway.server import Books, Doors, application
from coase.tools.gateway.usage import UsageJournal
from tests.agents.market import Market, market

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

PATIENT = Windows(lock_s=100, dispute_s=100, answer_s=100, rule_s=100)
PRICE_UNITS = 20_000
EXPOSURE_UNITS = 22_000
CHAT: dict[str, Any] = {
    "model": "echo",
    "messages": [{"role": "user", "content": "one two three"}],
    "max_tokens": 20,
    "temperature": 0,
    "stream": False,
}
PATHS = ("/v1/chat/completions", "/v1/messages", "/api/chat")


@asynccontextmanager
async def client(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", timeout=100
    ) as web:
        yield web


@dataclass(slots=True)
class Shop:
    """A gateway that buys all, with a journal of what was used, on a market of its own."""

    place: Market
    buyer: Agent
    web: httpx.AsyncClient
    keys: KeyFile
    usage: UsageJournal
    firm: FirmFile
    till: Till

    async def ask(self, key: str, path: str = PATHS[0], **headers: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}", **headers}
        return await self.web.post(path, json=CHAT, headers=headers)


@asynccontextmanager
async def shop(folder: Path, *, budget: str | None = None) -> AsyncIterator[Shop]:
    seller = inference_agent(
        "seller",
        price=Price.per_task("0.02"),
        compute=EchoCompute(),
        stock=Stock([ModelInfo(name="echo")]),
        strategy="fixed",
        windows=PATIENT,
        capacity=64,
    )
    buyer = Agent("gateway", budget=budget)
    usage, keys = UsageJournal(folder), KeyFile(folder)
    async with market(folder) as place:
        place.node.firm = firm = FirmFile(folder / "firm.json")
        await place.join(seller, buyer)
        assert buyer.seat is not None
        asset = place.node.settlement.asset
        till = Till(buyer.purse, name=buyer.name)
        place.node.runtime.observers.append(till.notice)
        place.node.runtime.observers.append(partial(usage.notice, asset, buyer.address))
        past = rows_of(place.node.journal.summaries(buyer.address))
        usage.heal(asset, buyer.seat.desk.threads.values(), past)
        bought = MarketCompute(
            buyer,
            max_price="0.05",
            decide_after_ms=50,
            reply_within_ms=100_000,
            limits=Limits(queue_max=200),
            settlements=("none", "escrow"),
        )
        app = application(
            RouterCompute(market=bought), Doors(key_file=keys), Books(till=till, usage=usage)
        )
        async with client(app) as web:
            yield Shop(place, buyer, web, keys, usage, firm, till)
        await place.rest()
    usage.close()


# ---- the file of keys ---------------------------------------------------------------------------


def test_a_key_is_kept_as_a_hash_that_nobody_else_reads(tmp_path: Path) -> None:
    ring = KeyFile(tmp_path)
    key = ring.add("alice", Budget(total="1.5", per_day="0.2"))
    assert key.startswith(PREFIX)
    assert len(key) > 50
    text = (tmp_path / KEYS_FILE).read_text()
    assert key not in text
    assert (tmp_path / KEYS_FILE).stat().st_mode & 0o777 == 0o600
    callers, new = ring.callers()
    assert new
    assert callers.find(key) == ring.read()["alice"]
    assert callers.find(key[:-1]) is callers.find("") is callers.find("\udcff") is None
    assert not ring.callers()[1]
    KeyFile(tmp_path).change("alice", {"per_day": None})
    assert ring.callers()[0].keys.popitem()[1].budget == Budget(total="1.5")  # type: ignore[attr-defined]
    KeyFile(tmp_path).remove("alice")
    assert ring.callers()[0].find(key) is None


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 65, "ä"])
def test_a_key_has_a_name_that_can_be_typed(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="is no name"):
        KeyFile(tmp_path).add(name, Budget())


def test_names_are_taken_once_and_must_be_known(tmp_path: Path) -> None:
    ring = KeyFile(tmp_path)
    ring.add("alice", Budget())
    with pytest.raises(ConfigurationError, match="'alice' already"):
        ring.add("alice", Budget())
    for step in (ring.remove, partial(ring.change, limits={})):
        with pytest.raises(ConfigurationError, match="no key 'bob'; there is: alice"):
            step("bob")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"keys": 3}', '{"keys": {"a": {}}}', '{"keys": {"a": {"sha256": "x"}}}']
)
async def test_a_damaged_file_of_keys_lets_nobody_in(tmp_path: Path, text: str) -> None:
    ring = KeyFile(tmp_path)
    key = ring.add("alice", Budget())
    ring.path.write_text(text)
    with pytest.raises(ConfigurationError, match="no file of keys"):
        ring.read()
    app = application(RouterCompute(local=EchoCompute()), Doors(key_file=ring))
    async with client(app) as web:
        answer = await web.get("/api/tags", headers={"x-api-key": key})
    assert answer.status_code == 503
    assert "keys of this gateway cannot be read" in answer.json()["error"]


def test_a_file_of_keys_that_others_may_read_is_refused(tmp_path: Path) -> None:
    ring = KeyFile(tmp_path)
    ring.add("alice", Budget())
    ring.path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        ring.callers()


# ---- who is let in ------------------------------------------------------------------------------


async def test_keys_count_from_the_request_on_that_follows(tmp_path: Path) -> None:
    ring = KeyFile(tmp_path)
    app = application(RouterCompute(local=EchoCompute()), Doors(key_file=ring, keys=("plain",)))
    async with client(app) as web:
        assert (await web.get("/v1/models")).status_code == 401
        key = ring.add("alice", Budget())
        for headers, status in (
            ({"authorization": f"Bearer {key}"}, 200),
            ({"x-api-key": key}, 200),
            ({"x-api-key": "plain"}, 200),
            ({"x-api-key": f"{key} "}, 401),
            ({"authorization": f"Basic {key}"}, 401),
            ({}, 401),
        ):
            answer = await web.get("/v1/models", headers=headers)
            assert answer.status_code == status, headers
        ring.remove("alice")
        answer = await web.get("/v1/models", headers={"x-api-key": key})
        assert answer.status_code == 401
        assert "coase gateway keys add" in answer.json()["error"]["message"]
        assert (await web.head("/")).status_code == 200, "whether it is there, anybody may ask"


async def test_without_any_key_nobody_is_asked_unless_others_could_come(tmp_path: Path) -> None:
    for keyed, status in ((False, 200), (True, 401)):
        doors = Doors(key_file=KeyFile(tmp_path), keyed=keyed)
        async with client(application(RouterCompute(local=EchoCompute()), doors)) as web:
            assert (await web.get("/api/tags")).status_code == status


# ---- budgets ------------------------------------------------------------------------------------


async def test_each_key_has_a_budget_of_its_own_below_that_of_the_gateway(tmp_path: Path) -> None:
    async with shop(tmp_path, budget="0.07") as it:
        alice = it.keys.add("alice", Budget(total="0.023"))
        bob = it.keys.add("bob", Budget())
        assert (await it.ask(alice)).status_code == 200
        await it.place.rest()
        for path in PATHS:
            answer = await it.ask(alice, path)
            assert answer.status_code == 402, path
            error = answer.json()["error"]
            words = error if isinstance(error, str) else error["message"]
            assert "the budget of the API key 'alice' has 0.003 COASE left" in words
            assert "coase gateway keys change alice --budget" in words
            if path == PATHS[0]:
                assert error["code"] == "insufficient_quota"
            if path == PATHS[1]:
                assert error["type"] == "billing_error"
        assert (await it.ask(bob)).status_code == 200
        await it.place.rest()
        it.keys.change("alice", {"total": "0.05"})
        assert (await it.ask(alice)).status_code == 200
        await it.place.rest()
        answer = await it.ask(bob)
        assert answer.status_code == 402
        words = answer.json()["error"]["message"]
        assert "the budget of this gateway has 0.01 COASE left" in words
        assert "coase budget gateway --total" in words
        assert it.place.earned(it.buyer) == -3 * PRICE_UNITS


async def test_a_key_that_has_spent_all_is_still_answered_by_the_engine_here(
    tmp_path: Path,
) -> None:
    ring = KeyFile(tmp_path)
    key = ring.add("alice", Budget(total="0"))
    app = application(RouterCompute(local=EchoCompute()), Doors(key_file=ring))
    async with client(app) as web:
        answer = await web.post(PATHS[0], json=CHAT, headers={"x-api-key": key})
    assert answer.status_code == 200


async def test_thirty_callers_with_one_key_get_what_it_pays_for_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "PATIENCE_MAX_S", 100)
    statuses: list[int] = []
    async with shop(tmp_path) as it:
        key = it.keys.add("alice", Budget(total="0.085"))
        most = 0

        def watch(*_: object) -> None:
            nonlocal most
            most = max(most, it.buyer.purse.used_by("alice"))

        it.place.node.runtime.observers.append(watch)

        async def one(path: str) -> None:
            statuses.append((await it.ask(key, path)).status_code)

        async with anyio.create_task_group() as group:
            for number in range(30):
                group.start_soon(one, PATHS[number % 3])
        await it.place.rest()
        # Three at once; a fourth is paid for by what the deals of those three give back. On a
        # machine so slow that an agreement comes too late it may be less, and never more.
        spent = it.buyer.purse.used_by("alice")
        answered = statuses.count(200)
        assert set(statuses) <= {200, 402, 503}
        assert 0 < PRICE_UNITS * answered <= spent <= most <= 85_000
        assert it.place.earned(it.buyer) == -spent
    async with shop(tmp_path) as it:
        assert it.buyer.purse.used_by("alice") == spent, "it holds after a restart too"


async def test_money_that_is_promised_is_waited_for_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, returned = anyio.Event(), Till.returned

    async def watched(till: Till) -> None:
        waits.set()
        await returned(till)

    monkeypatch.setattr(calls, "PATIENCE_MAX_S", 0.01)
    async with shop(tmp_path) as it:
        key = it.keys.add("alice", Budget(total="0.045"))
        assert (await it.ask(key)).status_code == 200
        it.buyer.purse.reserve("elsewhere", EXPOSURE_UNITS, "0x1", now_ms=0, account="alice")
        answer = await it.ask(key)
        assert answer.status_code == 402
        monkeypatch.setattr(calls, "PATIENCE_MAX_S", 100)
        monkeypatch.setattr(Till, "returned", watched)
        statuses: list[int] = []

        async def patient() -> None:
            statuses.append((await it.ask(key)).status_code)

        async with anyio.create_task_group() as group:
            group.start_soon(patient)
            await waits.wait()
            assert not statuses
            it.buyer.purse.release("elsewhere", now_ms=0)
            it.till.notice(it.buyer.address, Notice("ended", "elsewhere"))
        assert statuses == [200]


async def test_whose_budget_is_spent_is_answered_by_the_firm_for_nothing(tmp_path: Path) -> None:
    async with shop(tmp_path) as it:
        key = it.keys.add("alice", Budget(total="0"))
        answer = await it.ask(key)
        assert answer.status_code == 402
        it.firm.write(new_firm("home"))
        answer = await it.ask(key)
        assert (answer.status_code, answer.headers["x-coase-made"]) == (200, "firm")
        it.firm.forget()
        assert (await it.ask(key)).status_code == 402
        await it.place.rest()
        assert it.place.earned(it.buyer) == 0
        (used,) = it.usage.sums(["key"])
        assert (used.calls, used.failed, used.deals, used.paid_units) == (3, 2, 1, 0)


# ---- what was used ------------------------------------------------------------------------------


async def test_what_was_used_is_known_by_key_tag_and_model_also_after_a_restart(
    tmp_path: Path,
) -> None:
    async with shop(tmp_path) as it:
        alice = it.keys.add("alice", Budget())
        bob = it.keys.add("bob", Budget(total="0"))
        await it.ask(alice, **{"x-coase-tag": "essay\x1b[31m"})
        body = {**CHAT, "user": "no", "metadata": {"tag": "mail"}}
        await it.web.post(PATHS[0], json=body, headers={"x-api-key": alice})
        body = {**CHAT, "metadata": {"user_id": "mail"}}
        await it.web.post(PATHS[1], json=body, headers={"x-api-key": alice})
        assert (await it.ask(bob)).status_code == 402
        await it.place.rest()
        before = it.usage.sums(["key", "tag", "model", "made"])
    journal = UsageJournal(tmp_path)
    found = journal.sums(["key", "tag", "model", "made"])
    assert found == before
    told = [(*s.group.values(), s.calls, s.failed, s.output_tokens, s.paid_units) for s in found]
    assert told == [
        ("alice", "essay?[31m", "echo", "bought", 1, 0, 3, PRICE_UNITS),
        ("alice", "mail", "echo", "bought", 2, 0, 6, 2 * PRICE_UNITS),
        ("bob", "", "echo", "", 1, 1, 0, 0),
    ]
    (day,) = journal.sums(["day"])
    assert (day.calls, day.deals, day.paid_units, day.open_units) == (4, 3, 3 * PRICE_UNITS, 0)
    assert (day.symbol, day.decimals) == ("COASE", 6)
    assert journal.sums(["day"], since_ms=2**60) == []
    journal.forget(before_ms=2**60)
    (left,) = journal.sums(["key"])
    assert (left.calls, left.deals) == (0, 3)
    with pytest.raises(ConfigurationError, match="not 'moon'"):
        journal.sums(["moon"])
    journal.close()
    assert (tmp_path / "usage.sqlite").stat().st_mode & 0o077 == 0
    for tail in ("", "-wal", "-shm"):
        (tmp_path / f"usage.sqlite{tail}").unlink(missing_ok=True)
    async with shop(tmp_path) as it:  # As if it had been killed before it wrote anything.
        (healed,) = it.usage.sums(["key", "made"])
        assert healed.group == {"key": "alice", "made": "bought"}
        assert (healed.calls, healed.deals, healed.paid_units) == (0, 3, 3 * PRICE_UNITS)


async def test_answers_of_the_engine_here_are_counted_and_questions_about_models_are_not(
    tmp_path: Path,
) -> None:
    usage = UsageJournal(tmp_path)
    app = application(RouterCompute(local=EchoCompute()), Doors(), Books(usage=usage))
    async with client(app) as web:
        for path in PATHS:
            async with web.stream("POST", path, json={**CHAT, "stream": True}) as answer:
                await answer.aread()
        await web.post("/v1/embeddings", json={"model": "echo", "input": "one two"})
        await web.get("/api/tags")
        await web.post(PATHS[0], content=b"nonsense")
        await web.post(PATHS[0], json={**CHAT, "model": "nobody"})
    told = [(*s.group.values(), s.calls, s.output_tokens) for s in usage.sums(["model", "made"])]
    assert told == [("echo", "local", 4, 9), ("nobody", "", 1, 0)]
    usage.close()


# ---- web pages ----------------------------------------------------------------------------------


async def test_pages_of_named_origins_may_ask_and_read_why_not(tmp_path: Path) -> None:
    ring = KeyFile(tmp_path)
    key = ring.add("alice", Budget())
    doors = Doors(origins=("http://localhost:3000", "tauri://*"), key_file=ring)
    async with client(application(RouterCompute(local=EchoCompute()), doors)) as web:
        asked = {
            "origin": "http://localhost:3000",
            "access-control-request-method": "POST",
            "access-control-request-headers": "x-stainless-os, authorization",
            "access-control-request-private-network": "true",
        }
        before = await web.options("/v1/chat/completions", headers=asked)
        assert before.status_code == 204
        assert before.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert before.headers["access-control-allow-headers"] == "x-stainless-os, authorization"
        assert before.headers["access-control-allow-private-network"] == "true"
        assert "POST" in before.headers["access-control-allow-methods"]
        for origin, given, status in (
            ("tauri://localhost", key, 200),
            ("tauri://localhost", "wrong", 401),
            ("http://localhost:3001", key, 403),
            ("null", key, 403),
        ):
            headers = {"origin": origin, "authorization": f"Bearer {given}"}
            answer = await web.get("/v1/models", headers=headers)
            assert answer.status_code == status, origin
            allowed = answer.headers.get("access-control-allow-origin")
            assert allowed == (origin if status != 403 else None)
        assert (await web.options("/api/chat", headers={"origin": "null"})).status_code == 403


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "shape"),
    [
        ("GET", "/v1/nothing", {}, 404, "openai"),
        ("GET", "/nothing", {}, 404, "openai"),
        ("GET", "/v1/nothing", {"anthropic-version": "2023-06-01"}, 404, "anthropic"),
        ("GET", "/v1/messages", {}, 405, "anthropic"),
        ("GET", "/api/nothing", {}, 404, "ollama"),
        ("DELETE", "/api/delete", {}, 501, "ollama"),
        ("POST", "/api/pull", {}, 501, "ollama"),
        ("POST", "/api/blobs/sha256:00", {}, 501, "ollama"),
    ],
)
async def test_what_is_not_here_is_said_in_the_shape_of_the_api(
    method: str, path: str, headers: dict[str, str], status: int, shape: str
) -> None:
    async with client(application(RouterCompute(local=EchoCompute()))) as web:
        answer = await web.request(method, path, headers=headers)
    assert answer.status_code == status
    error = json.loads(answer.text)["error"]
    assert isinstance(error, str) is (shape == "ollama")
    assert ("param" in error) is (shape == "openai")
    assert (answer.json().get("type") == "error") is (shape == "anthropic")
    assert "not served here" in (error if isinstance(error, str) else error["message"])


async def test_a_client_finds_out_that_it_is_there() -> None:
    async with client(application(RouterCompute(local=EchoCompute()))) as web:
        for path in ("/", "/api/tags", "/api/version", "/v1/models", "/v1/models/"):
            got, head = await web.get(path), await web.head(path)
            assert got.status_code == head.status_code == 200, path
            assert head.content == b""
            assert got.content
