"""Every error that Coase raises, and who is to blame for it.

::

    CoaseError
    ├── LocalError                    we, or our caller, did something wrong
    │   ├── LocalProtocolError        a move that our own side may not make now
    │   ├── ConfigurationError        a setting, file or environment that cannot work
    │   ├── AssetMismatch             two amounts of different assets met
    │   ├── BudgetExhausted           a spending limit was reached; nothing was signed
    │   └── BookOutOfBalance          money does not add up: a defect of ours, never ignored
    ├── RemoteError                   the counterparty, or a stranger, did something wrong
    │   ├── MalformedEnvelope         bytes that are no envelope: dropped without an answer
    │   ├── BadSignature              a signature that is not the claimed sender's
    │   └── RemoteProtocolError       well-formed and signed, but against the rules
    │       └── Refused               carries the reason that a NACK gives
    └── WorldError                    neither side: network, chain, disk, engine
        ├── JournalFailed             the disk refused; nothing of the group was performed
        ├── TransportUnavailable      the broker cannot be reached
        ├── ChainUnavailable          the chain cannot be reached
        │   └── FeeTooHigh            gas costs more than we pay; nothing was signed
        ├── CallReverted              the contract refused the call, with its reason
        ├── ComputeFailed             the engine failed or refused the work
        └── DealFailed                the deal ended without what was asked for
"""

from __future__ import annotations


class CoaseError(Exception):
    """Base of everything that Coase raises on purpose."""


class LocalError(CoaseError):
    """Our own side is to blame."""


class LocalProtocolError(LocalError):
    """Our own side tried a move that the tables of states do not allow now."""


class ConfigurationError(LocalError):
    """A setting, a file or the environment cannot work; the message says what to do."""


class AssetMismatch(LocalError):
    """Two amounts of different assets were added, compared or paid for one another."""

    def __init__(self, left: object, right: object) -> None:
        super().__init__(f"amounts of different assets met: {left} and {right}")
        self.left, self.right = left, right


class BudgetExhausted(LocalError):
    """A spending limit was reached; nothing was signed and nothing was sent."""

    def __init__(self, *, limit: str, asked_units: int, left_units: int) -> None:
        super().__init__(
            f"the limit {limit!r} has {left_units} units left and {asked_units} were asked for"
        )
        self.limit, self.asked_units, self.left_units = limit, asked_units, left_units


class BookOutOfBalance(LocalError):
    """Units appeared or vanished. This is a defect, and the program must stop."""

    def __init__(self, before_units: int, after_units: int) -> None:
        super().__init__(f"the book held {before_units} units before and {after_units} after")
        self.before_units, self.after_units = before_units, after_units


class RemoteError(CoaseError):
    """The counterparty or a stranger is to blame."""


class MalformedEnvelope(RemoteError):
    """Bytes that are no envelope of this protocol. Counted and dropped without an answer."""


class BadSignature(RemoteError):
    """A signature that is malformed, malleable, or not the claimed signer's."""


class RemoteProtocolError(RemoteError):
    """Well-formed and signed, but not allowed: wrong state, wrong terms, wrong addressee."""


class Refused(RemoteProtocolError):
    """A message refused with one of the reasons that a NACK can carry."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class WorldError(CoaseError):
    """Neither side is to blame: the network, the chain, the disk or an engine."""


class JournalFailed(WorldError):
    """A commit failed. Nothing of its group was performed; restart from the journal."""


class TransportUnavailable(WorldError):
    """The message broker cannot be reached."""


class ChainUnavailable(WorldError):
    """The chain's endpoint cannot be reached or does not answer sensibly."""


class FeeTooHigh(ChainUnavailable):
    """A transaction would cost more than our limit; nothing was signed, and it may be later."""


class CallReverted(WorldError):
    """The contract, or its memory twin, refused a call and changed nothing."""

    def __init__(self, error: str, *values: object) -> None:
        super().__init__(f"{error}({', '.join(str(value) for value in values)})")
        self.error, self.values = error, values


class ComputeFailed(WorldError):
    """An engine failed, is missing, or refused the work."""


class DealFailed(WorldError):
    """A deal ended without the result that was asked for; says in which state and why."""

    def __init__(self, state: str, why: str, *, deal_id: str = "") -> None:
        super().__init__(
            f"the deal ended {state}: {why}" + (f" (deal {deal_id})" if deal_id else "")
        )
        self.state, self.why, self.deal_id = state, why, deal_id
