"""One broker, one chain and one arbiter for the live tests of one worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.live.market import Forge, Market, market, with_environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.hookimpl(tryfirst=True)  # The plugin reads the marks in the same hook.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the live tests to two workers: a market for each, and neither is the last to end."""
    for item in items:
        if "live" in item.path.parts:
            group = "live-runtime" if item.path.stem == "test_runtime" else "live"
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    home = tmp_path_factory.mktemp("live") / "home"
    with market(home) as running:
        yield running
    assert with_environment(f"COASE_HOME={home}") == []


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    made = Forge()
    yield made
    made.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory for the actors of one test."""
    return tmp_path
