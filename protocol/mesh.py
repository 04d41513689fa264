"""Who is around on the local network, which of them to dial, and why not the others.

What was heard is a hint; what the broker says of its routes is the proof, and a proven route is
never given up for a hint. Forged advertisements cost a line in a table of bounded size and attempts
to connect that fail, as often as the limits here allow. Time comes in as an argument, in
milliseconds of any clock that only goes forward.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from .advert import MESH_VERSION, OPEN_NETWORK, Advert, Heard, Malformed, News, Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MESH_NODES_MAX: Final = 32
"""Nodes of one mesh, ourselves among them: each holds a route to every other."""

MEMBERS_MAX: Final = 128  # Heard with our tag; more than fit, so that forged ones can be sifted.
STRANGERS_MAX: Final = 256
GONE_GRACE_MS: Final = 60_000  # A node that comes back in this time finds its route where it was.
DIAL_PATIENCE_MS: Final = 10_000  # A route takes 0.1 s; a loaded machine may take seconds.
BACKOFF_MIN_MS: Final = 15_000
BACKOFF_MAX_MS: Final = 300_000
CHANGES_BURST: Final = 8  # A classroom that starts at once comes together at once.
CHANGE_EVERY_MS: Final = 5_000  # After that, whoever forges advertisements causes no more reloads.


@dataclass(frozen=True, slots=True, order=True)
class Dial:
    """A route that our broker shall hold."""

    node_id: str
    address: str
    """``10.0.0.7:4248`` or ``[fd00::7]:4248``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line about somebody that was heard. All of its text is safe to print."""

    node_id: str
    name: str = ""
    software: str = ""
    network: str = ""
    addresses: tuple[str, ...] = ()
    joined: bool = False
    why: str = ""
    """Why it is not joined; or, of one that is, what is noteworthy."""
    serves_chain: bool = False
    heard_ms: int = 0


@dataclass(slots=True)
class _Failures:
    count: int = 0
    until_ms: int = 0

    def add(self, now_ms: int) -> None:
        wait_ms = BACKOFF_MIN_MS << min(self.count, 16)
        self.count += 1
        self.until_ms = now_ms + min(wait_ms, BACKOFF_MAX_MS)


@dataclass(slots=True)
class _Member:
    advert: Advert
    first_ms: int
    heard_ms: int
    likely: tuple[str, ...]
    """Where it may be dialled by what it says, the most likely first."""
    left_ms: int | None = None
    """When its advertisement went; None while it stands."""
    proven: str = ""
    """The address at which our broker reached it last."""
    up: bool = False
    down_ms: int = 0
    dialled: str = ""
    """The address in force, if any."""
    dialled_ms: int = 0
    failures: dict[str, _Failures] = field(default_factory=dict)
    runs: tuple[str, ...] = ()
    doubled: bool = False

    def expires_ms(self) -> int | None:
        if self.up or self.left_ms is None:
            return None
        return max(self.left_ms, self.down_ms) + GONE_GRACE_MS

    def addresses(self) -> tuple[str, ...]:
        """Return where to look for it: where it was proven first."""
        if not self.proven or self.proven == self.likely[0]:
            return self.likely
        return tuple(dict.fromkeys((self.proven, *self.likely)))

    def waits(self, address: str, now_ms: int) -> bool:
        return address in self.failures and self.failures[address].until_ms > now_ms


class Membership:
    """The table of one node: tell it what was heard and proven, ask it what to dial and show."""

    def __init__(self, own: Advert, *, loopback: bool = False) -> None:
        self._own = own
        self._loopback = loopback
        self._members: dict[str, _Member] = {}
        self._strangers: dict[str, Row] = {}
        self._up: dict[str, str] = {}
        self._in_force: tuple[Dial, ...] = ()
        self._changes_left = CHANGES_BURST
        self._refilled_ms: int | None = None
        self._full = False
        self._clash = ""
        self._strangers_dropped = 0

    # What happens

    def note(self, news: News, now_ms: int) -> None:
        """Take in one piece of news."""
        if isinstance(news, Heard):
            self.heard(news.advert, now_ms)
        elif isinstance(news, Malformed):
            self.malformed(news.label, news.refusal, now_ms)
        else:
            self.gone(news.node_id, now_ms)

    def heard(self, advert: Advert, now_ms: int) -> None:
        """Take in an advertisement; saying the same again is free."""
        own = self._own
        if advert.node_id == own.node_id:
            if advert.run != own.run:
                self._clash = (
                    f"another node on this network goes by our id {own.node_id}, at"
                    f" {', '.join(_endpoints(advert)[:3])}: if its state directory is a copy of"
                    " ours, start one of the two with a state directory of its own"
                )
        elif advert.network != own.network or advert.version != own.version:
            if advert.network != own.network and (member := self._members.get(advert.node_id)):
                self._leave(member, now_ms)  # It was ours and has gone over, or somebody says so.
            self._stranger(advert, now_ms)
        elif member := self._members.get(advert.node_id):
            self._heard_again(member, advert, now_ms)
        elif self._make_room(now_ms):
            self._strangers.pop(advert.node_id, None)
            member = _Member(advert, now_ms, now_ms, self._likely(advert), runs=(advert.run,))
            member.up = advert.node_id in self._up
            self._members[advert.node_id] = member

    def malformed(self, label: str, refusal: Refusal, now_ms: int) -> None:
        """Keep a line about something that is no advertisement of ours."""
        self._keep(label, Row(node_id=label, why=f"malformed: {refusal.reason}", heard_ms=now_ms))

    def gone(self, node_id: str, now_ms: int) -> None:
        """Take in a goodbye. It may be forged: a route that stands is kept as long as it does."""
        self._strangers.pop(node_id, None)
        if member := self._members.get(node_id):
            self._leave(member, now_ms)

    def connected(self, routes: Mapping[str, str], now_ms: int) -> None:
        """Take in what the broker is connected with: node id to address, "" if they dialled us.

        This is the proof of a route. An address that stands in ``routes()`` for ten seconds
        without its node showing up here has failed: the next one has its turn, and after the last
        all wait, for longer each time.
        """
        self._up = dict(routes)
        for node_id, member in self._members.items():
            was_up, member.up = member.up, node_id in routes
            if member.up:
                address = routes[node_id]
                if address and address in (member.dialled, *member.likely):
                    member.proven = address
                    member.failures.pop(address, None)
            elif was_up:
                member.down_ms = member.dialled_ms = now_ms  # The broker dials it again first.
            elif member.dialled and now_ms - member.dialled_ms >= DIAL_PATIENCE_MS:
                self.dial_failed(node_id, member.dialled, now_ms)

    def dial_failed(self, node_id: str, address: str, now_ms: int) -> None:
        """Let an address wait: nobody answered there, or not with a certificate of ours."""
        member = self._members.get(node_id)
        if member is None or member.up or member.waits(address, now_ms):
            return
        if address in member.addresses():
            member.failures.setdefault(address, _Failures()).add(now_ms)

    def moved(self, own: Advert) -> None:
        """Take in that our own advertisement has changed."""
        self._own = own
        for member in self._members.values():
            member.likely = self._likely(member.advert)

    # What follows from it

    def routes(self, now_ms: int) -> tuple[Dial, ...]:
        """Return what to dial: one address per node, sorted, the same until there is reason.

        It changes eight times at once and then every five seconds at most, whatever is heard.
        """
        self._expire(now_ms)
        wanted = self._wanted(now_ms)
        if wanted != self._in_force and self._may_change(now_ms):
            self._in_force = wanted
            addresses = {dial.node_id: dial.address for dial in wanted}
            for node_id, member in self._members.items():
                address = addresses.get(node_id, "")
                if address != member.dialled:
                    member.dialled, member.dialled_ms = address, now_ms
        return self._in_force

    def next_change_ms(self, now_ms: int) -> int | None:
        """Return when ``routes`` may give another answer without any news, None if never."""
        times: list[int] = []
        if self.routes(now_ms) != self._wanted(now_ms) and self._refilled_ms is not None:
            times.append(self._refilled_ms + CHANGE_EVERY_MS)
        for member in self._members.values():
            if (expires_ms := member.expires_ms()) is not None:
                times.append(expires_ms)
            if not member.up:
                times += [one.until_ms for one in member.failures.values()]
        return min((time for time in times if time > now_ms), default=None)

    def rows(self, now_ms: int) -> tuple[Row, ...]:
        """Return a line for everybody heard: the joined first, then ours, then strangers."""
        self._expire(now_ms)
        ours = [self._row(member, now_ms) for member in self._members.values()]
        for node_id in self._up.keys() - self._members.keys():
            why = "not heard here: another node told of it, or it dialled us"
            ours.append(Row(node_id=node_id, network=self._own.network, joined=True, why=why))
        ours.sort(key=lambda row: (not row.joined, row.node_id))
        others = [row for row in self._strangers.values() if row.node_id not in self._up]
        return (*ours, *sorted(others, key=lambda row: row.node_id))

    @property
    def clash(self) -> str:
        """Somebody else goes by our node id: the sentence to show, or ""."""
        return self._clash

    @property
    def strangers_dropped(self) -> int:
        """How many lines were dropped because too many strangers were heard."""
        return self._strangers_dropped

    # The table

    def _heard_again(self, member: _Member, advert: Advert, now_ms: int) -> None:
        came_back = member.left_ms is not None
        member.heard_ms, member.left_ms = now_ms, None
        if advert == member.advert and not came_back:
            return
        if advert.run != member.advert.run:
            # A node that starts again has a new run. One that goes back to an older run is two.
            member.doubled = advert.run in member.runs
            others = tuple(run for run in member.runs if run != advert.run)
            member.runs = (*others, advert.run)[-3:]
        member.advert, member.likely = advert, self._likely(advert)
        known = member.addresses()
        member.failures = {a: f for a, f in member.failures.items() if a in known}
        if came_back:
            member.failures.clear()

    def _leave(self, member: _Member, now_ms: int) -> None:
        if member.left_ms is None:
            member.left_ms = now_ms

    def _make_room(self, now_ms: int) -> bool:
        self._expire(now_ms)
        if len(self._members) < MEMBERS_MAX:
            return True
        # Those that never answered go first; what has proved itself once is not dropped for a hint.
        unproven = [m for m in self._members.values() if not (m.up or m.proven)]
        if not unproven:
            return False
        worst = max(unproven, key=lambda m: (_failed(m), -m.first_ms, m.advert.node_id))
        del self._members[worst.advert.node_id]
        self._strangers_dropped += 1
        return True

    def _expire(self, now_ms: int) -> None:
        for node_id, member in list(self._members.items()):
            expires_ms = member.expires_ms()
            if expires_ms is not None and expires_ms <= now_ms:
                del self._members[node_id]

    def _stranger(self, advert: Advert, now_ms: int) -> None:
        if advert.network == self._own.network:
            why = f"it speaks version {advert.version} of the mesh, we {MESH_VERSION}: update one"
        elif advert.network == OPEN_NETWORK:
            why = "it takes everybody without a join code; ours needs one"
        elif self._own.network == OPEN_NETWORK:
            why = "it needs its join code; ours is open to everybody"
        else:
            why = "it has another join code"
        self._keep(
            advert.node_id,
            Row(
                node_id=advert.node_id,
                name=advert.name,
                software=advert.software,
                network=advert.network,
                addresses=_endpoints(advert),
                why=why,
                serves_chain=advert.serves_chain,
                heard_ms=now_ms,
            ),
        )

    def _keep(self, key: str, row: Row) -> None:
        self._strangers.pop(key, None)
        self._strangers[key] = row
        if len(self._strangers) > STRANGERS_MAX:
            del self._strangers[next(iter(self._strangers))]
            self._strangers_dropped += 1

    # The choice

    def _wanted(self, now_ms: int) -> tuple[Dial, ...]:
        up = [member for member in self._members.values() if member.up]
        down = [m for m in self._members.values() if not m.up and self._choice(m, now_ms)]
        down.sort(key=lambda m: (not m.proven, _failed(m), m.first_ms, m.advert.node_id))
        places = MESH_NODES_MAX - 1 - len(self._up)
        self._full = len(down) > places
        chosen = [*up, *down[: max(0, places)]]
        dials = ((m.advert.node_id, self._choice(m, now_ms)) for m in chosen)
        return tuple(sorted(Dial(node_id, address) for node_id, address in dials if address))

    def _choice(self, member: _Member, now_ms: int) -> str:
        """Return the one address to dial, "" if there is none now."""
        if member.up:
            # Whoever dialled us is reached: to dial back would only make our broker hang up one.
            return member.dialled or member.proven
        addresses = [a for a in member.addresses() if not member.waits(a, now_ms)]
        if member.dialled in addresses:
            return member.dialled
        if not addresses and member.left_ms is None:
            return member.proven  # It was there once and says that it still is: go on knocking.
        return addresses[0] if addresses else ""

    def _likely(self, advert: Advert) -> tuple[str, ...]:
        nearest_first = sorted(advert.addresses, key=self._unlikely)
        return tuple(_endpoint(address, advert.port) for address in nearest_first)

    def _unlikely(self, text: str) -> tuple[bool, int, int, int]:
        """Sort what is nearest to our own addresses to the front.

        An address that we have ourselves is that of a container bridge, the same on each
        machine; unless the node runs on this one.
        """
        ip = ipaddress.ip_address(text)
        own = [ipaddress.ip_address(own) for own in self._own.addresses]
        shared_bits = max((_shared_bits(ip, one) for one in own), default=0)
        return ip in own, ip.version, -shared_bits, int(ip)

    def _may_change(self, now_ms: int) -> bool:
        if self._refilled_ms is None:
            self._refilled_ms = now_ms
        earned = (now_ms - self._refilled_ms) // CHANGE_EVERY_MS
        if earned > 0:
            self._changes_left = min(CHANGES_BURST, self._changes_left + earned)
            self._refilled_ms += earned * CHANGE_EVERY_MS
        if self._changes_left <= 0:
            return False
        self._changes_left -= 1
        return True

    # The lines

    def _row(self, member: _Member, now_ms: int) -> Row:
        advert = member.advert
        return Row(
            node_id=advert.node_id,
            name=advert.name,
            software=advert.software,
            network=advert.network,
            addresses=member.addresses(),
            joined=member.up,
            why="; ".join(self._remarks(member, now_ms)),
            serves_chain=advert.serves_chain,
            heard_ms=member.heard_ms,
        )

    def _remarks(self, member: _Member, now_ms: int) -> Iterator[str]:
        if member.doubled:
            yield (
                "two nodes go by this id: if one state directory is a copy of the other, start one"
                " of them with a state directory of its own"
            )
        if member.up:
            if member.left_ms is not None:
                yield "its advertisement is gone, its route stands"
            return
        if member.left_ms is not None:
            yield "it went away"
        elif not self._choice(member, now_ms):
            until_ms = min(
                one.until_ms for one in member.failures.values() if one.until_ms > now_ms
            )
            yield (
                f"nobody with our join code answers at {', '.join(member.addresses()[:3])}"
                f" (a firewall, or a forged advertisement); next try in"
                f" {max(0, until_ms - now_ms + 999) // 1000} s"
            )
        elif member.dialled:
            yield f"dialling {member.dialled}"
        elif self._full:
            yield f"the mesh is full: {MESH_NODES_MAX} nodes"
        else:
            yield "about to be dialled"


def _failed(member: _Member) -> int:
    return sum(one.count for one in member.failures.values())


def _endpoints(advert: Advert) -> tuple[str, ...]:
    return tuple(_endpoint(address, advert.port) for address in advert.addresses)


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _shared_bits(one: ipaddress.IPv4Address | ipaddress.IPv6Address, other: object) -> int:
    if type(one) is not type(other) or not isinstance(other, type(one)):
        return 0
    return one.max_prefixlen - (int(one) ^ int(other)).bit_length()
