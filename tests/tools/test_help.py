"""``coase --help``: every command has its place among those that go with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coase.tools.cli import app as cli

from .commands import command

if TYPE_CHECKING:
    from typer.models import CommandInfo, TyperInfo


def test_every_command_has_its_place_and_every_place_its_command() -> None:
    whole = command()
    shown: list[CommandInfo | TyperInfo] = [*whole.registered_commands, *whole.registered_groups]
    places = {cli._name_of(entry): entry.rich_help_panel for entry in shown}
    assert cli.OTHERS not in places.values()
    named = {name for names in cli.PANELS.values() for name in names.split()}
    assert set(places) == named
