"""How fast a network's chain is, and what follows: margins, windows, how often it is asked.

On a chain of one's own a block comes every second and is believed at once. On one that others run
a transaction waits for its block and then for its confirmations, clocks differ, and a halt must be
survived: who acts in the last seconds there acts too late. What is known of a chain by its preset,
or said of it in the network file, decides; of an unknown one the slowest is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from coase.escrow.chains import ChainKind, kind_of_chain
from coase.escrow.presets import LOCAL, preset_of
from coase.protocol.session import Margins

from .caution import confirmations_of
from .seller import Windows, lock_within_s

if TYPE_CHECKING:
    from .config import Network

BLOCK_SLOWEST_MS: Final = 12_000  # Ethereum's own: few are slower.
BLOCKS_TO_INCLUDE: Final = 2  # A transaction with a fair fee is in the next, or after it.
CLOCK_SKEW_S: Final = 30  # What clocks may differ by; on one's own chain there is one clock.
POLLS_PER_BLOCK: Final = 5  # A new block is seen within a fifth of its time.
POLL_MIN_S: Final = 0.2
PATIENCE_BLOCKS: Final = 10  # A signature so late still saves the seller a transaction.


@dataclass(frozen=True, slots=True)
class Care:
    """What we want of a kind of chain, whatever its pace. Seconds."""

    halt_s: int
    dispute_s: int
    rule_s: int
    skew_s: int = CLOCK_SKEW_S


_CARE: Final = {
    ChainKind.LOCAL: Care(halt_s=Margins().halt_s, dispute_s=60, rule_s=60, skew_s=0),
    # Nothing is lost there but time, which is the tester's.
    ChainKind.TEST: Care(halt_s=60, dispute_s=600, rule_s=600),
    # A node is found dead, an endpoint changed, a sequencer mended; and an arbiter may be asleep.
    ChainKind.MAIN: Care(halt_s=1_200, dispute_s=3_600, rule_s=24 * 3_600),
}


@dataclass(frozen=True, slots=True)
class Pace:
    """What a network's chain asks of who deals on it."""

    block_ms: int
    margins: Margins
    windows: Windows
    """What a seller offers that names none of its own."""
    submit_s: int
    """What bringing a delivery on chain takes beyond what it takes on a local one."""
    poll_s: float
    """How often the newest block is asked for while somebody waits for one."""

    def within_s(self, work_s: int) -> int:
        """Return the time to deliver in, from the lock, of work that takes ``work_s``."""
        return work_s + self.submit_s


def pace_of(network: Network) -> Pace:
    """Return the pace of the chain of ``network``."""
    block_ms = block_ms_of(network)
    care = _CARE[kind_of_chain(network.chain_id, own=network.faucet)]
    blocks = BLOCKS_TO_INCLUDE + confirmations_of(network)
    chain_s = _up(blocks * block_ms, 1_000) + care.skew_s
    slower_s = max(chain_s - Margins().chain_s, 0)
    # Both sides' margins must fit, with room for a counterparty that waits a little longer.
    dispute_s = max(care.dispute_s, 60 * _up(3 * chain_s + care.halt_s + 30, 60))
    return Pace(
        block_ms=block_ms,
        margins=Margins(
            chain_s=chain_s,
            settle_patience_ms=max(Margins().settle_patience_ms, _patience_ms(block_ms)),
            halt_s=care.halt_s,
        ),
        windows=Windows(
            lock_s=lock_within_s(chain_s),
            dispute_s=dispute_s,
            answer_s=dispute_s,
            rule_s=max(care.rule_s, 60 * _up(4 * chain_s + care.halt_s + 30, 60)),
        ),
        submit_s=2 * slower_s,
        poll_s=max(POLL_MIN_S, block_ms / 1_000 / POLLS_PER_BLOCK),
    )


def block_ms_of(network: Network) -> int:
    """Return how long a block of the network's chain takes."""
    if network.block_ms:
        return network.block_ms
    if network.faucet:
        return LOCAL.block_ms
    preset = preset_of(network.chain_id)
    return preset.block_ms if preset is not None else BLOCK_SLOWEST_MS


def _patience_ms(block_ms: int) -> int:
    """On a local chain a transaction costs nothing, and patience only time."""
    return PATIENCE_BLOCKS * block_ms if block_ms > LOCAL.block_ms else 0


def _up(value: int, part: int) -> int:
    return -(-value // part)
