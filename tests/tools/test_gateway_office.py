"""A gateway with keys as an office runs it: killed in mid-answer, started again, and asked."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.late import Late
from tests.tools.commands import Home, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import openai
else:
    openai = Late("openai")

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("clients"),  # One worker loads them.
]

WORDS = " ".join(f"word{number}" for number in range(60))
SLOW = """
from coase.agents import Price
from coase.agents.compute.echo import EchoCompute
from coase.agents.inference import inference_agent

slow = inference_agent(
    "slow", price=Price.per_million(input="1", output="1"), compute=EchoCompute(chunk_delay_s=0.1)
)
"""


@pytest.mark.slow
def test_a_killed_gateway_knows_afterwards_what_each_key_spent(tmp_path: Path) -> None:
    home, file = Home(tmp_path / "home"), tmp_path / "slow.py"
    file.write_text(SLOW)
    buying = ("gateway", "--no-local", "--max-price", "0.05", "--budget", "1", "--port", "0")
    with home.running("up", "--json") as up:
        up.ready()
        key = home.json("gateway", "keys", "add", "alice", "--budget", "0.5")["key"]
        with home.running("agent", "run", str(file), "--engine", "none", "--json") as slow:
            slow.ready()
            with home.running(*buying, "--json") as gateway:
                url = gateway.ready()["url"]
                with pytest.raises(openai.AuthenticationError, match="gateway keys add"):
                    openai.OpenAI(base_url=f"{url}/v1", api_key="x").models.list()
                client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
                events = client.chat.completions.create(
                    model="auto",
                    messages=[{"role": "user", "content": WORDS}],
                    max_tokens=400,
                    temperature=0,
                    stream=True,
                    user="essay",
                )
                next(iter(events))
                gateway.end(signal.SIGKILL)
                with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
                    list(events)
                client.close()
            with home.running(*buying, "--json") as gateway:
                gateway.ready()

                def settled() -> dict[str, Any] | None:
                    (row,) = home.json("gateway", "usage", "--by", "key")
                    return row if row["open_units"] == "0" else None

                used = eventually(settled)
        assert (used["key"], used["deals"]) == ("alice", 1)
        assert int(used["paid_units"]) > 0
        (told,) = home.json("gateway", "keys", "list")
        assert told["spent"] == used["paid"]
        assert told["promised"] == "0"
        assert told["limits"]["total"]["limit"] == "0.5"


class _NoModels(BaseHTTPRequestHandler):
    """An Ollama that was installed and has pulled nothing."""

    def do_GET(self) -> None:
        """Answer what clients ask first."""
        told: dict[str, Any] = {"models": []}
        if self.path == "/api/version":
            told = {"version": "0.12.0"}
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def ollama_without_models() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _NoModels)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
def test_what_an_ollama_has_is_sold_and_else_what_is_embedded(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    buying = ("gateway", "--no-local", "--max-price", "0.05", "--budget", "1", "--port", "0")
    with (
        home.running("up", "--json") as up,
        # Its API is Ollama's, so that it is one for who sells.
        home.running("gateway", "--engine", "echo", "--port", "0", "--json") as front,
    ):
        up.ready()
        home.environment["OLLAMA_HOST"] = url = front.ready()["url"]
        with home.running("sell", "--json") as sell, home.running(*buying, "--json") as gateway:
            ready = sell.ready()
            assert (ready["engine"], ready["models"]) == (f"Ollama at {url}", ["echo"])
            body = {"model": "echo", "prompt": "one two", "stream": False}
            asked = f"{gateway.ready()['url']}/api/generate"
            answer = httpx.post(asked, json=body, timeout=100).json()
            assert sorted(answer["response"].split()) == ["one", "two"]
            assert answer["coase"]["seller"] == ready["address"]
            assert sell.process.stdout is not None
            deal = json.loads(sell.process.stdout.readline())
            assert deal["state"] == "settled"
            assert int(deal["earned_units"]) > 0
        with ollama_without_models() as url:
            home.environment["OLLAMA_HOST"] = url
            with home.running("sell", "--json") as sell:
                ready = sell.ready()
                assert ready["engine"].startswith("the embedded engine")
                assert int(ready["earned_before_units"]) == int(deal["earned_units"])
                assert f"the Ollama at {url} has no model" in sell.said().replace("\n", " ")
