"""One broker, one chain and one arbiter for all live tests, which one worker runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.live.market import Forge, Market, market, with_environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.hookimpl(tryfirst=True)  # The plugin reads the marks in the same hook.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give all live tests to the same worker, so that there is one market."""
    for item in items:
        if "live" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("live"))


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
