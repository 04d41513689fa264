"""What one seed does to its world: how many agents, how bad they are, and what breaks how often."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

SELLER_VICES = (
    "no_delivery",
    "garbage",
    "hash_only",
    "declines",
    "vanishes",
    "lies",
    "late",
    "no_answer",
    "overcounts",
    "other_text",
    "stops",
)
BUYER_VICES = (
    "no_lock",
    "no_task",
    "no_settle",
    "false_dispute",
    "no_check",
    "vanishes",
    "lies",
    "no_voucher",
    "underpays",
    "stale_voucher",
    "foreign_voucher",
    "arms",
)
# Only where there are rates, so that the others come as often elsewhere.
RATES_SELLER_VICES = ("refuses_and_works", "twice")
RATES_BUYER_VICES = ("miscalls", "miscalls")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The knobs of a world. The defaults are a calm one, in which every deal must settle."""

    buyers: int = 2
    sellers: int = 3
    both: int = 1
    """Agents that buy and sell."""
    asks: int = 12
    asks_every_ms: int = 400
    limit_units: int = 1_000_000
    """What each buyer may spend; prices are around a thousand."""
    real_keys: bool = False

    vices_percent: int = 0
    """Of the agents, how many have a vice; a vice shows in half of an agent's deals."""
    arbiter: str = "honest"
    """``honest``, ``silent``, ``random``, or ``none``: deals without an arbiter."""
    strangers: bool = False
    """Whether anybody pokes, claims refunds and tries what is not allowed."""
    eve: bool = False
    """Whether somebody replays, flips, cuts, forges and floods on the network."""

    loss_permille: int = 0
    double_permille: int = 0
    slow_permille: int = 0
    """Of the messages, how many are late by up to 700 ms, and so overtaken."""
    partitions: bool = False
    skew_ms: int = 0

    confirmations: int = 0
    reorg_permille: int = 0
    """Of the blocks; each undoes at most as many blocks as the agents wait for."""
    deep_reorgs: bool = False
    """Whether reorgs undo what the agents took for certain: then only sums and ends can hold."""
    lose_call_permille: int = 0
    lose_receipt_permille: int = 0
    halts: bool = False
    blacklist: bool = False

    crash_permille: int = 0
    """Of the points at which a crash could matter."""
    commit_fail_permille: int = 0
    large_percent: int = 0
    """Of the tasks and results, how many need pieces."""
    metered_percent: int = 0
    rounds_percent: int = 0
    """Of the requests, how many are bargained for as agents do it."""
    channel_percent: int = 0
    """Of the requests, how many would rather be paid by a channel."""
    firm_percent: int = 0
    """Of the requests, how many would rather be for nothing, as they are within a firm."""
    rates_percent: int = 0
    """Of what is wanted, how much is called for under rates, where they can be agreed."""

    @property
    def calm(self) -> bool:
        """Whether nothing may go wrong, so that every deal must settle."""
        return self == Plan(
            buyers=self.buyers,
            sellers=self.sellers,
            both=self.both,
            asks=self.asks,
            asks_every_ms=self.asks_every_ms,
            large_percent=self.large_percent,
            metered_percent=self.metered_percent,
            rounds_percent=self.rounds_percent,
            channel_percent=self.channel_percent,
            firm_percent=self.firm_percent,
            rates_percent=self.rates_percent,
            real_keys=self.real_keys,
            confirmations=self.confirmations,
        )

    @property
    def streams(self) -> bool:
        """Whether there are channels at all."""
        return bool(self.channel_percent or self.firm_percent)

    @property
    def seller_vices(self) -> tuple[str, ...]:
        """What a seller may do."""
        return SELLER_VICES + (RATES_SELLER_VICES if self.rates_percent else ())

    @property
    def buyer_vices(self) -> tuple[str, ...]:
        """What a buyer may do."""
        return BUYER_VICES + (RATES_BUYER_VICES if self.rates_percent else ())

    @classmethod
    def draw(cls, seed: int, rng: random.Random, *, asks: int = 0) -> Plan:
        """Return the plan of ``seed``: every tenth is calm, every fiftieth has real keys."""
        agents: dict[str, Any] = {
            "buyers": rng.randint(1, 4),
            "sellers": rng.randint(1, 5),
            "both": rng.randint(0, 2),
            "asks": asks or rng.randint(8, 24),
            "asks_every_ms": rng.choice((50, 300, 1_000)),
            "large_percent": rng.choice((0, 0, 5)),
            "metered_percent": rng.choice((0, 30)),
            "confirmations": rng.choice((0, 1, 2, 3)),
            "channel_percent": rng.choice((0, 50, 50, 100)),
            "firm_percent": rng.choice((0, 0, 30)),
        }
        if agents["channel_percent"] or agents["firm_percent"]:
            # By a draw of its own: worlds without rates are what they always were.
            own = random.Random(f"rates/{seed}")
            agents["rates_percent"] = own.choice((0, 0, 50, 90))
        real = seed % 50 == 7
        if real:
            agents["asks"] = min(int(agents["asks"]), 8)
        if seed % 10 == 0:
            return cls(**agents, real_keys=real)

        def maybe(*values: int) -> int:
            return rng.choice(values) if rng.random() < 0.6 else 0

        return cls(
            **agents,
            real_keys=real,
            limit_units=rng.choice((1_000_000, 1_000_000, 4_000, 1_500)),
            vices_percent=maybe(20, 50, 80),
            arbiter=rng.choice(("honest", "honest", "honest", "silent", "random", "none")),
            strangers=rng.random() < 0.5,
            eve=rng.random() < 0.5,
            loss_permille=maybe(10, 50, 200),
            double_permille=maybe(10, 100),
            slow_permille=maybe(20, 200),
            partitions=rng.random() < 0.3,
            skew_ms=maybe(200, 1_500),
            reorg_permille=maybe(20, 100),
            lose_call_permille=maybe(20, 100),
            lose_receipt_permille=maybe(50),
            halts=rng.random() < 0.3,
            blacklist=rng.random() < 0.2,
            crash_permille=maybe(1, 5, 20),
            commit_fail_permille=maybe(5, 20),
            rounds_percent=maybe(50, 100),
        )
