"""Run simulated worlds: ``run.py --seeds 1000``, or ``run.py --seed 17 --trace`` for one.

Prints how many deals a second were simulated and what became of them. A seed that breaks an
invariant is printed with the command that shows it again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

# Started as a script: what is imported must be the same modules as under pytest.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from coase.protocol.errors import CoaseError  # noqa: E402
from tests.simulation.plan import Plan  # noqa: E402
from tests.simulation.world import Report, Violation, World  # noqa: E402

PROGRESS_S = 5.0
FAILURES_MAX = 5


def simulate(seed: int, *, asks: int = 0, trace: bool = False) -> Report:
    """Run the world of ``seed``; ``asks`` overrides how many requests it has."""
    plan = Plan.draw(seed, random.Random(seed), asks=asks) if asks else None
    return World(seed, plan, trace=trace).run()


def seeds_of(text: str, first: int) -> range:
    """Return the seeds that ``--seeds`` names: a number of them, or ``17..18``."""
    if ".." in text:
        low, high = text.split("..", 1)
        return range(int(low), int(high) + 1)
    return range(first, first + int(text))


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return 0 if no invariant was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="100", help="how many, or FIRST..LAST")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--deals", type=int, default=0, help="requests in each world")
    parser.add_argument("--trace", action="store_true", help="print all that happens")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    seeds = seeds_of(options.seeds, options.first)
    if options.seed is not None:
        seeds = range(options.seed, options.seed + 1)
    outcomes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    failed: list[int] = []
    deals = events = 0
    began = said = time.monotonic()
    worked = time.process_time()
    for done, seed in enumerate(seeds, start=1):
        found = False
        try:
            report = simulate(seed, asks=options.deals, trace=options.trace)
            found = True
        except (Violation, CoaseError):
            traceback.print_exc()
            failed.append(seed)
        finally:
            if not found:  # Whatever it was, this is how to see it again.
                more = f" --deals {options.deals}" if options.deals else ""
                command = f".venv/bin/python tests/simulation/run.py --seed {seed}{more} --trace"
                print(f"FAILED: {command}")
        if not found:
            if len(failed) >= FAILURES_MAX:
                break
            continue
        deals, events = deals + report.deals, events + report.events
        outcomes.update(report.outcomes)
        counts.update(report.counts)
        if len(seeds) == 1:
            print(f"trace {report.digest}")
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            print(f"{done} of {len(seeds)} seeds, {deals / (said - began):.0f} deals/s", flush=True)
    took = max(time.monotonic() - began, 1e-9)
    worked = max(time.process_time() - worked, 1e-9)
    print(
        f"{deals} deals, {events} events in {took:.1f} s: {deals / took:.0f} deals/s,"
        f" {deals / worked:.0f} in each second of processor time"
    )
    for table in (outcomes, counts):
        print("; ".join(f"{name} {count}" for name, count in table.most_common()))
    if options.json:
        figures = {"deals": deals, "events": events, "took_s": took, "processor_s": worked}
        print(json.dumps({**figures, "outcomes": outcomes, "failed": failed}))
    if failed:
        print(f"{len(failed)} seeds failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
