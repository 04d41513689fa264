"""What all tests share: one event loop library, and property tests that do not watch the clock."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# As the embedded chain's own process chooses it; read when the machine is loaded. The other one is
# written in Python around a library, and hashes are a tenth of what a contract's call takes.
os.environ.setdefault("ETH_HASH_BACKEND", "pysha3")

# Two cores are shared by the whole suite, so how long an example takes says nothing about the code.
settings.register_profile(
    "coase", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
# In CI the same examples are drawn every time: a red run means a change, not a lucky draw.
settings.register_profile("ci", settings.get_profile("coase"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "coase")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio alone, since the network libraries know nothing else."""
    return "asyncio"
