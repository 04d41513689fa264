"""``coase sell`` and ``coase gateway`` as two users run them, on one market."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.late import Late
from tests.tools.commands import Home

if TYPE_CHECKING:
    from pathlib import Path

    import openai
else:
    openai = Late("openai")

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("clients"),  # One worker loads them.
]

# Long enough that it is never over before the next seller is there.
WORDS = " ".join(f"word{number}" for number in range(1_500))
SLOW = """
from coase.agents import Price
from coase.agents.compute.echo import EchoCompute
from coase.agents.inference import inference_agent

slow = inference_agent(
    "slow", price=Price.per_million(input="1", output="1"), compute=EchoCompute(chunk_delay_s=0.05)
)
"""


@pytest.mark.slow
def test_an_answer_goes_on_when_its_seller_is_killed(tmp_path: Path) -> None:
    home, file = Home(tmp_path / "home"), tmp_path / "slow.py"
    file.write_text(SLOW)
    buying = ("--no-local", "--max-price", "0.05", "--budget", "1", "--port", "0", "--stall", "5")
    with home.running("up", "--json") as up:
        up.ready()
        with (
            home.running("agent", "run", str(file), "--engine", "none", "--json") as slow,
            home.running("gateway", *buying, "--json") as gateway,
        ):
            first = slow.ready()["agents"][0]["address"]
            url = gateway.ready()["url"]
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            stream = client.chat.completions.create(
                model="auto",
                messages=[{"role": "user", "content": WORDS}],
                max_tokens=3_000,
                temperature=0,
                stream=True,
            )
            events = iter(stream)
            text = next(events).choices[0].delta.content or ""
            text += next(events).choices[0].delta.content or ""
            assert WORDS.startswith(text)
            assert len(text) < len(WORDS)
            with home.running("sell", "--engine", "echo", "--json") as sell:
                ready = sell.ready()
                assert ready["models"] == ["echo"]
                slow.end(signal.SIGKILL)
                rest = list(events)
                client.close()
                text += "".join(e.choices[0].delta.content or "" for e in rest if e.choices)
                assert text == WORDS
                extras = [event.model_extra or {} for event in rest]
                origin = next(extra["coase"] for extra in extras if "coase" in extra)
                assert origin["seller"] == ready["address"]
                assert origin["sellers_before"] == [first]
                assert sell.process.stdout is not None
                deal = json.loads(sell.process.stdout.readline())
                assert deal["deal"] == origin["deal"]
                assert deal["state"] == "settled"
                assert int(deal["earned_units"]) > 0


def test_a_gateway_needs_no_market(tmp_path: Path) -> None:
    with Home(tmp_path / "home").running(
        "gateway", "--engine", "echo", "--port", "0", "--json"
    ) as it:
        ready = it.ready()
        assert ready["models"] == ["echo"]
        body = {"model": "echo", "prompt": "one two", "stream": False}
        answer = httpx.post(f"{ready['url']}/api/generate", json=body, timeout=60)
        assert answer.json()["response"] == "one two"
        assert it.end() == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("gateway", "--no-local"), "give --max-price and --budget"),
        (("gateway", "--max-price", "1"), "go together"),
        (("gateway", "--host", "0.0.0.0"), "--key-file"),  # noqa: S104 - it is refused.
        (("gateway", "--key-file", "nowhere", "--engine", "echo"), "cannot be read"),
        (("gateway", "--engine", "steam"), "no engine 'steam'"),
        (("sell", "--strategy", "fixed"), "coase up"),
    ],
)
def test_what_is_called_wrongly_is_said(tmp_path: Path, args: tuple[str, ...], says: str) -> None:
    assert says in Home(tmp_path).call(*args, code=2).stderr.replace("\n", " ")
