"""The public face has every name that it lists, and loads none before it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import coase.agents


def test_every_name_is_there() -> None:
    assert dir(coase.agents) == sorted(coase.agents.__all__)
    for name in coase.agents.__all__:
        assert getattr(coase.agents, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Broker'"):
        _ = coase.agents.Broker


def test_a_part_is_loaded_without_the_others() -> None:
    # Each check of a result is a process of its own, with a limit on its time.
    code = (
        "import sys, coase.agents.checks;"
        "print([name for name in ('coase.agents.agent', 'nats', 'aiohttp') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout == "[]\n"
