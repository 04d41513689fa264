"""``coase audit``: journal, book and chain held against each other."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from .app import EXIT_FAILED, Json, app, emit, out, perform
from .wallet_commands import State, places_of, viewing

if TYPE_CHECKING:
    from coase.agents.audit import Report
    from coase.agents.audit_channels import Finding


@app.command("audit")
def audit_(state: State = None, json_: Json = False) -> None:
    """Check that journal, book and chain agree, and name every difference.

    Works beside agents that run, and when none runs. Exits with 1 if something differs.

    Example: [b]coase audit[/b]
    """
    report = perform(lambda: _audit(state))
    if json_:
        emit(asdict(report) | {"agree": not report.differences})
    else:
        _print(report)
    if report.differences:
        raise typer.Exit(EXIT_FAILED)


async def _audit(state: Any) -> Report:
    from coase.agents.audit import audit
    from coase.agents.config import load_network
    from coase.agents.wallet import Reach

    network = load_network()
    async with viewing(network) as settlement:
        return await audit(settlement, places_of(network, state), reach=Reach.of(network))


def _print(report: Report) -> None:
    out.print(
        f"checked {report.keys} keys, {report.deals} deals, {report.channels} channels,"
        f" {report.transactions} transactions and {report.postings} postings at block"
        f" {report.block}",
        highlight=False,
        soft_wrap=True,
    )
    for finding in report.notes:
        _line("note", "yellow", finding)
    for finding in report.differences:
        _line("differs", "red", finding)
    if not report.differences:
        out.print("[green]they agree[/]: journal, book and chain")


def _line(mark: str, style: str, finding: Finding) -> None:
    about = [f"deal {finding.deal[:16]}"] if finding.deal else []
    about += [f"channel {finding.channel[:16]}"] if finding.channel else []
    about += [finding.owner] if finding.owner else []
    out.print(f"[{style}]{mark}[/]", end=" ")
    text = f"{finding.where}: {finding.what}" + (f" ({', '.join(about)})" if about else "")
    out.print(text, highlight=False, markup=False, soft_wrap=True)
