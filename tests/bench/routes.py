"""The router: how long it decides, and what it comes to beside six other ways of choosing.

``.venv/bin/python tests/bench/routes.py`` plays the large market and draws the README's picture.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

sys.path.insert(0, str(Path(__file__).parents[2]))  # Run as a script from anywhere.

from coase.agents.compute.routing import RouteBook, Wish
from coase.agents.compute.ways import Listing, Place, Size
from tests.bench.parts import emit
from tests.simulation.routes import BASELINES, SETTINGS, averaged, contest

if TYPE_CHECKING:
    from tests.simulation.routes import Figures

PICTURE: Final = Path(__file__).parents[2] / "examples" / "pictures" / "routes.svg"
KNOWN: Final = 1_000
AIM_MS: Final = 1.0
CALLS: Final = 5_000
SEEDS: Final = (1, 2, 3)

WIDTH, HEIGHT = 860, 470
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 74, 56
LABEL: Final = 260  # The longest text beside a mark.
OURS, THEIRS, INK, FAINT = "#0b6e99", "#a0522d", "#1f2933", "#d5dbe1"


def decision(count: int) -> None:
    """Measure decisions with a thousand known sellers, each after something was learnt."""
    chance, book = random.Random(1), RouteBook()
    for number in range(KNOWN):
        listing = Listing(
            seller=f"0x{number:040x}",
            place=Place.MARKET,
            model="m",
            input_units=chance.randrange(100_000, 2_000_000),
            output_units=chance.randrange(400_000, 9_000_000),
            token_us=chance.randrange(5_000, 60_000),
        )
        book.learn(listing, now_ms=0)
    wish, taken = Wish(models=("m",), second_units=200), list[float]()
    for now_ms in range(count):
        size = Size(chance.randrange(10, 2_000), chance.randrange(10, 500))
        began = time.perf_counter()
        ranking = book.decide(wish, size, now_ms=now_ms, chance=chance.getrandbits(64)).ranking
        taken.append((time.perf_counter() - began) * 1_000)
        first = ranking[0]
        book.delivered(first.seller, "m", size, first_us=300_000, took_us=900_000, now_ms=now_ms)
    ranked = sorted(taken[1:])
    emit(
        "router_decision_p50",
        ranked[len(ranked) // 2],
        "ms",
        p99_ms=ranked[len(ranked) * 99 // 100],
        first_ms=taken[0],
        known=KNOWN,
        aim_ms=AIM_MS,
    )


def market(*, seeds: tuple[int, ...], calls: int) -> list[Figures]:
    """Play the market and print what each way of choosing comes to."""
    found = averaged([contest(seed, calls=calls) for seed in seeds])
    ours = found[len(BASELINES) :]
    for figures in found:
        beaten = [other.name for other in ours if other.beats(figures)]
        emit(
            "router_" + figures.name.replace(" ", "_"),
            figures.p50_ms / 1_000,
            "s",
            p95_s=figures.p95_ms / 1_000,
            cost_units=figures.cost,
            failed_percent=100 * figures.failed,
            bad_percent=100 * figures.bad,
            beaten_by=", ".join(beaten),
        )
    return found


def routes(*, quick: bool) -> None:
    """Measure all of it."""
    decision(200 if quick else 2_000)
    market(seeds=SEEDS[:1] if quick else SEEDS, calls=800 if quick else CALLS)


# ---- The picture -----------------------------------------------------------------------------


class Plot:
    """Cost across, time up, both of which are better small; the time on a logarithmic scale."""

    def __init__(self, found: list[Figures]) -> None:
        costs, times = [f.cost for f in found], [f.p95_ms / 1_000 for f in found]
        self.cost_from, self.cost_to = min(costs) * 0.85, max(costs) * 1.22
        self.time_from, self.time_to = min(times) * 0.8, max(times) * 1.25

    def x(self, cost: float) -> float:
        """Return where a cost lies."""
        share = (cost - self.cost_from) / (self.cost_to - self.cost_from)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, seconds: float) -> float:
        """Return where a time lies."""
        top, bottom = math.log(self.time_to), math.log(self.time_from)
        share = (math.log(seconds) - bottom) / (top - bottom)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def picture(found: list[Figures], *, seeds: int, calls: int) -> str:
    """Return the drawing of what each way of choosing comes to."""
    plot, others, ours = Plot(found), found[: len(BASELINES)], found[len(BASELINES) :]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="system-ui, sans-serif" font-size="13" role="img"'
        ' aria-label="Cost and 95th percentile of time of the router and of six other policies">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        _text(LEFT, 28, "Who to buy from: 200 sellers, some slow, lying, failing or leaving", 16),
        _text(
            LEFT,
            49,
            f"each mark: one way of choosing over {calls:,} calls, mean of {seeds} seeds;"
            " lower and further left is better",
            12,
        ),
    ]
    parts += _axes(plot)
    points = " ".join(f"{plot.x(f.cost):.1f},{plot.y(f.p95_ms / 1_000):.1f}" for f in ours)
    parts.append(f'<polyline points="{points}" fill="none" stroke="{OURS}" stroke-width="2"/>')
    parts += [_mark(plot, figures, OURS) for figures in ours]
    parts += [_mark(plot, figures, THEIRS) for figures in others]
    parts += _labels(plot, others)
    for figures, worth in ((ours[0], SETTINGS[0]), (ours[-1], SETTINGS[-1])):
        at = plot.x(figures.cost), plot.y(figures.p95_ms / 1_000)
        word = f"coase, a second worth {worth:,} units"
        parts += _label(min(at[0] - 2, WIDTH - LABEL), at[1] - 28, word, figures, OURS)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axes(plot: Plot) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for seconds in (5, 10, 20, 40):
        if plot.time_from < seconds < plot.time_to:
            y = plot.y(seconds)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="{FAINT}"/>')
            parts.append(_text(LEFT - 8, y + 4, f"{seconds} s", 12, anchor="end"))
    for cost in range(0, 4_000, 250):
        if plot.cost_from < cost < plot.cost_to:
            x = plot.x(cost)
            parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="{FAINT}"/>')
            parts.append(_text(x, bottom + 18, f"{cost:,}", 12, anchor="middle"))
    middle = (LEFT + right) / 2
    parts.append(_text(middle, HEIGHT - 14, "units paid for an answer", 13, anchor="middle"))
    where = f'transform="translate(18 {(TOP + bottom) / 2:.0f}) rotate(-90)"'
    parts.append(f'<text {where} text-anchor="middle" fill="{INK}">time, 95th percentile</text>')
    return parts


def _mark(plot: Plot, figures: Figures, colour: str) -> str:
    x, y = plot.x(figures.cost), plot.y(figures.p95_ms / 1_000)
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{colour}" stroke="#ffffff"/>'


def _labels(plot: Plot, others: list[Figures]) -> list[str]:
    """Write beside each mark, and below the one before where that would be in the way."""
    parts, before = list[str](), -100.0
    ordered = sorted(others, key=lambda figures: (figures.cost > 900, figures.p95_ms), reverse=True)
    for figures in ordered:
        y = max(plot.y(figures.p95_ms / 1_000) - 2, before + 32 if figures.cost > 900 else 0)
        before = y
        parts += _label(plot.x(figures.cost) + 12, y, figures.name, figures, THEIRS)
    return parts


def _label(x: float, y: float, word: str, figures: Figures, colour: str) -> list[str]:
    told = f"{100 * figures.failed:.1f} % failed, {100 * figures.bad:.0f} % bad answers"
    return [
        _text(x, y, word, 13, colour=colour, weight="bold"),
        _text(x, y + 14, told, 11),
    ]


def _text(
    x: float,
    y: float,
    words: str,
    size: int,
    *,
    anchor: str = "start",
    colour: str = INK,
    weight: str = "normal",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
        f' fill="{colour}" font-weight="{weight}" stroke="#ffffff" stroke-width="3"'
        f' paint-order="stroke">{words}</text>'
    )


def main() -> None:
    """Play the large market and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    seeds = tuple(range(1, arguments.seeds + 1))
    found = market(seeds=seeds, calls=arguments.calls)
    drawing = picture(found, seeds=len(seeds), calls=arguments.calls)
    arguments.out.write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
