"""Whom to dial and why: what was heard is a hint, what the broker is connected with is proof."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coase.protocol.advert import (
    ADDRESSES_MAX,
    NAME_MAX_CHARS,
    OPEN_NETWORK,
    TEXT_MAX_BYTES,
    Advert,
    Gone,
    Heard,
    Malformed,
    Refusal,
    address,
    printable_name,
)
from coase.protocol.errors import ConfigurationError
from coase.protocol.mesh import (
    BACKOFF_MAX_MS,
    BACKOFF_MIN_MS,
    CHANGE_EVERY_MS,
    CHANGES_BURST,
    DIAL_PATIENCE_MS,
    GONE_GRACE_MS,
    MEMBERS_MAX,
    MESH_NODES_MAX,
    STRANGERS_MAX,
    Dial,
    Membership,
    Row,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

OURS, OTHERS = "a" * 32, "b" * 32


def node(number: int, **fields: object) -> Advert:
    plain: dict[str, object] = {
        "node_id": f"{number:016x}",
        "network": OURS,
        "addresses": (f"10.0.{number // 250}.{number % 250 + 1}",),
        "port": 4248,
        "run": "00000000",
    }
    return Advert(**(plain | fields))  # type: ignore[arg-type]


def table(*heard: Advert, now_ms: int = 0) -> Membership:
    membership = Membership(node(0))
    for advert in heard:
        membership.heard(advert, now_ms)
    return membership


def addresses(membership: Membership, now_ms: int) -> list[str]:
    return [dial.address for dial in membership.routes(now_ms)]


def row(membership: Membership, number: int, now_ms: int) -> Row:
    return next(r for r in membership.rows(now_ms) if r.node_id == f"{number:016x}")


def record(advert: Advert) -> dict[bytes, bytes | None]:
    return {key.encode(): value.encode() for key, value in advert.properties().items()}


# ---- Reading an advertisement ------------------------------------------------------------------


def test_what_is_advertised_is_read_again() -> None:
    said = node(
        7,
        name="Käthes Rechner",
        software="0.1.0+x",
        serves_chain=True,
        addresses=("10.1.2.3", "fd00::2"),
    )
    assert Advert.parse(record(said), said.addresses, said.port) == said


def test_what_later_versions_add_is_ignored() -> None:
    assert Advert.parse({**record(node(1)), b"more": b"x", b"flag": None}, ["10.0.0.9"], 1) == node(
        1, addresses=("10.0.0.9",), port=1
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({b"id": b"0123"}, "node id"),
        ({b"id": b"0" * 15 + b"G"}, "node id"),
        ({b"id": None}, "node id"),
        ({b"net": b"c" * 31}, "network"),
        ({b"run": b""}, "run"),
        ({b"v": b"0"}, "version"),
        ({b"v": b"1e3"}, "version"),
        ({b"v": b"\xd9\xa1"}, "version"),
        ({b"v": b"9" * 400}, "version"),
        ({b"name": b"\x1b[31mred"}, "name"),
        ({b"name": "right\u202eto left".encode()}, "name"),
        ({b"name": b"x" * (NAME_MAX_CHARS + 1)}, "name"),
        ({b"name": b"\xff\xfe"}, "UTF-8"),
        ({b"sw": b"1.0 (evil)"}, "software"),
        ({b"chain": b"yes"}, "chain"),
        ({b"x" * TEXT_MAX_BYTES: b""}, "longer"),
        ({bytes([65 + n, 65]): b"" for n in range(40)}, "properties"),
    ],
)
def test_a_malformed_text_is_refused_with_a_reason(
    changed: dict[bytes, bytes | None], reason: str
) -> None:
    read = Advert.parse({**record(node(1)), **changed}, ["10.0.0.9"], 4248)
    assert isinstance(read, Refusal)
    assert reason in read.reason


@pytest.mark.parametrize("port", [None, 0, -1, 65536])
def test_a_port_is_needed(port: int | None) -> None:
    read = Advert.parse(record(node(1)), ["10.0.0.9"], port)
    assert isinstance(read, Refusal)
    assert "port" in read.reason


@pytest.mark.parametrize(
    "text",
    (
        "| host | 10.0.0.300 | 0.0.0.0 | 0.1.2.3 | 127.0.0.1 | 224.0.0.251 | 240.0.0.1 | ::"
        " | 255.255.255.255 | ::1 | ff02::fb | fe80::1 | fe80::1%3 | fd00::1%3 | ::ffff:127.0.0.1"
    ).split("|"),
)
def test_an_address_that_leads_nowhere_is_left_out(text: str) -> None:
    text = text.strip()
    assert address(text) is None
    read = Advert.parse(record(node(1)), [text, "10.0.0.9"], 4248)
    assert isinstance(read, Advert)
    assert read.addresses == ("10.0.0.9",)
    assert isinstance(Advert.parse(record(node(1)), [text], 4248), Refusal)


def test_loopback_is_for_tests() -> None:
    assert isinstance(Advert.parse(record(node(1)), ["127.0.0.1"], 1, loopback=True), Advert)


def test_addresses_are_spelled_one_way_and_limited() -> None:
    read = Advert.parse(record(node(1)), ["FD00:0::2", "fd00::2", "169.254.3.4"], 4248)
    assert isinstance(read, Advert)
    assert read.addresses == ("fd00::2", "169.254.3.4")
    many = (f"10.0.0.{n}" for n in range(1, 200))
    assert isinstance(Advert.parse(record(node(1)), many, 4248), Refusal)
    assert len(list(many)) >= 199 - ADDRESSES_MAX - 1, "it read on after it had seen enough"


@given(
    properties=st.dictionaries(
        st.sampled_from([b"v", b"id", b"net", b"run", b"name", b"sw", b"chain"])
        | st.binary(max_size=9),
        st.none()
        | st.binary(max_size=40)
        | st.sampled_from([b"1", b"0" * 16, b"a" * 32, b"0" * 8]),
    ),
    texts=st.lists(st.text(max_size=20) | st.ip_addresses().map(str), max_size=20),
    port=st.none() | st.integers(),
)
def test_reading_never_raises_and_gives_only_printable_text(
    properties: dict[bytes, bytes | None], texts: list[str], port: int | None
) -> None:
    read = Advert.parse(properties, texts, port)
    if isinstance(read, Refusal):
        assert read.reason.isprintable()
        assert 0 < len(read.reason) <= 120
    else:
        assert Advert.parse(record(read), read.addresses, read.port) == read
        assert (read.name + read.software).isprintable()


@given(st.text())
def test_any_host_name_can_be_made_one_to_advertise(text: str) -> None:
    assert node(1, name=printable_name(text)).name == printable_name(text)


def test_we_do_not_advertise_what_nobody_would_take() -> None:
    with pytest.raises(ConfigurationError, match="addresses"):
        node(1, addresses=())
    with pytest.raises(ConfigurationError, match="leads nowhere"):
        node(1, addresses=("fe80::1",))


# ---- Whom to dial ------------------------------------------------------------------------------


def test_who_has_our_code_is_dialled_at_one_address_in_a_fixed_order() -> None:
    heard = [node(2), node(1), node(3, addresses=("fd00::3",))]
    expected = (
        Dial(f"{1:016x}", "10.0.0.2:4248"),
        Dial(f"{2:016x}", "10.0.0.3:4248"),
        Dial(f"{3:016x}", "[fd00::3]:4248"),
    )
    assert table(*heard).routes(0) == expected
    assert table(*reversed(heard)).routes(0) == expected


def test_the_address_nearest_to_ours_is_tried_first_and_container_bridges_last() -> None:
    membership = Membership(node(0, addresses=("192.168.7.5", "172.17.0.1", "fd00::5")))
    everywhere = ("172.17.0.1", "10.8.0.2", "fd00::6", "192.168.7.6")
    membership.heard(node(1, addresses=everywhere), 0)
    assert addresses(membership, 0) == ["192.168.7.6:4248"]
    assert row(membership, 1, 0).addresses[-1] == "172.17.0.1:4248"


@pytest.mark.parametrize(
    ("stranger", "why"),
    [
        (node(1, network=OTHERS), "another join code"),
        (node(1, network=OPEN_NETWORK), "without a join code"),
        (node(1, version=2), "version 2"),
    ],
)
def test_who_is_not_ours_is_shown_with_the_reason_and_not_dialled(
    stranger: Advert, why: str
) -> None:
    membership = table(stranger)
    assert membership.routes(0) == ()
    assert why in row(membership, 1, 0).why
    assert not row(membership, 1, 0).joined
    membership.gone(stranger.node_id, 1)
    assert membership.rows(1) == ()


def test_what_is_malformed_has_a_line() -> None:
    membership = table()
    membership.note(Malformed("odd", Refusal("its port is not one")), 5)
    assert [(r.node_id, r.why) for r in membership.rows(5)] == [
        ("odd", "malformed: its port is not one")
    ]


def test_our_own_echo_is_nothing_and_a_copy_of_us_is_told() -> None:
    membership = table(node(0))
    assert membership.rows(0) == ()
    assert membership.clash == ""
    membership.heard(node(0, run="11111111", addresses=("10.9.9.9",)), 1)
    assert "10.9.9.9" in membership.clash
    assert "state directory" in membership.clash
    assert membership.routes(1) == ()


def test_two_that_share_an_id_are_told_and_a_restart_is_not() -> None:
    one, two = node(1, run="11111111"), node(1, run="22222222", addresses=("10.0.0.99",))
    membership = table(one)
    membership.heard(two, 1)
    assert "two nodes" not in row(membership, 1, 1).why
    membership.heard(one, 2)
    assert "two nodes go by this id" in row(membership, 1, 2).why


# ---- Proof beats hint --------------------------------------------------------------------------


def proven(*, now_ms: int = 100) -> Membership:
    membership = table(node(1))
    membership.routes(0)
    membership.connected({node(1).node_id: "10.0.0.2:4248"}, now_ms)
    return membership


@pytest.mark.parametrize(
    "forged",
    [
        Heard(node(1, addresses=("10.66.6.6",), run="66666666")),
        Heard(node(1, network=OTHERS, addresses=("10.66.6.6",))),
        Heard(node(1, version=2)),
        Gone(node(1).node_id),
        Malformed(node(1).node_id, Refusal("nonsense")),
    ],
)
def test_no_forged_word_moves_a_route_that_stands(forged: Heard | Gone | Malformed) -> None:
    membership = proven()
    for now_ms in range(200, 10 * GONE_GRACE_MS, 1000):
        membership.note(forged, now_ms)
        membership.connected({node(1).node_id: "10.0.0.2:4248"}, now_ms)
        assert addresses(membership, now_ms) == ["10.0.0.2:4248"]
    assert row(membership, 1, 10 * GONE_GRACE_MS).joined


def test_after_the_route_broke_the_proven_address_comes_before_the_heard_one() -> None:
    membership = proven()
    membership.heard(node(1, addresses=("10.66.6.6",)), 200)
    membership.connected({}, 300)
    assert addresses(membership, 300) == ["10.0.0.2:4248"]
    membership.connected({}, 300 + DIAL_PATIENCE_MS)
    assert addresses(membership, 300 + DIAL_PATIENCE_MS) == ["10.66.6.6:4248"]


def test_a_node_that_moved_is_found_at_its_new_address() -> None:
    membership = proven()
    membership.connected({}, 1000)
    membership.heard(node(1, addresses=("10.0.7.7",)), 1000)
    membership.connected({}, 1000 + DIAL_PATIENCE_MS)
    assert addresses(membership, 1000 + DIAL_PATIENCE_MS) == ["10.0.7.7:4248"]
    membership.connected({node(1).node_id: "10.0.7.7:4248"}, 12_000)
    assert row(membership, 1, 12_000).joined
    membership.connected({}, 13_000)
    assert addresses(membership, 13_000) == ["10.0.7.7:4248"]


def test_a_proven_address_that_is_still_advertised_is_knocked_at_for_ever() -> None:
    membership = proven()
    for now_ms in range(1000, 600_000, 1000):
        membership.connected({}, now_ms)
        assert addresses(membership, now_ms) == ["10.0.0.2:4248"]


def test_whoever_dialled_us_is_joined_and_need_not_be_dialled() -> None:
    membership = table(node(1))
    membership.connected({node(1).node_id: ""}, 0)
    assert membership.routes(0) == ()
    assert row(membership, 1, 0).joined
    membership.connected({}, 1000)
    assert addresses(membership, 1000) == ["10.0.0.2:4248"]


def test_whoever_is_connected_but_was_not_heard_has_a_line_and_a_place() -> None:
    membership = table(*(node(number) for number in range(1, MESH_NODES_MAX)))
    membership.connected({node(99).node_id: ""}, 0)
    assert row(membership, 99, 0).joined
    assert len(membership.routes(0)) == MESH_NODES_MAX - 2
    membership.heard(node(99, name="heard late"), 1)
    assert row(membership, 99, 1).name == "heard late"
    assert row(membership, 99, 1).joined


def test_a_route_in_force_stays_when_they_dialled_us_too() -> None:
    membership = table(node(1))
    before = membership.routes(0)
    membership.connected({node(1).node_id: "10.0.0.2:51234"}, 100)
    assert membership.routes(100) == before


# ---- Failure, and going away -------------------------------------------------------------------


def test_addresses_take_turns_and_then_all_wait_longer_each_time() -> None:
    membership = table(node(1, addresses=("10.0.0.7", "10.0.0.8")))
    tried: list[str] = []
    waits: list[int] = []
    idle_since: int | None = None
    for now_ms in range(0, 2_000_000, 1000):
        membership.connected({}, now_ms)
        now = addresses(membership, now_ms)
        if now and now[0] not in tried[-1:]:
            tried += now
        if not now and idle_since is None:
            idle_since = now_ms
            assert "nobody with our join code answers" in row(membership, 1, now_ms).why
        if now and idle_since is not None:
            waits.append(now_ms - idle_since)
            idle_since = None
    assert tried[:4] == ["10.0.0.7:4248", "10.0.0.8:4248", "10.0.0.7:4248", "10.0.0.8:4248"]
    assert waits == sorted(waits)
    assert 0 < waits[0] <= BACKOFF_MIN_MS
    assert BACKOFF_MAX_MS // 2 < waits[-1] <= BACKOFF_MAX_MS


def test_who_comes_back_is_dialled_at_once() -> None:
    membership = table(node(1))
    membership.routes(0)
    membership.dial_failed(node(1).node_id, "10.0.0.2:4248", 0)
    assert membership.routes(1) == ()
    membership.gone(node(1).node_id, 2)
    membership.heard(node(1, run="11111111"), 3)
    assert addresses(membership, 3) == ["10.0.0.2:4248"]


def test_a_failure_at_an_address_that_nobody_named_is_not_kept() -> None:
    membership = table(node(1))
    for number in range(1000):
        membership.dial_failed(node(1).node_id, f"10.1.1.1:{number}", 0)
        membership.dial_failed(node(2).node_id, f"10.1.1.1:{number}", 0)
    assert addresses(membership, 0) == ["10.0.0.2:4248"]


def test_a_route_goes_a_minute_after_the_advertisement() -> None:
    membership = table(node(1))
    membership.routes(0)
    membership.gone(node(1).node_id, 1000)
    last_ms = 1000 + GONE_GRACE_MS - 1
    assert len(membership.routes(last_ms)) == 1
    assert membership.next_change_ms(last_ms) == last_ms + 1
    assert membership.routes(last_ms + 1) == ()
    assert membership.rows(last_ms + 1) == ()


def test_a_route_that_outlives_its_advertisement_goes_a_minute_after_it_broke() -> None:
    membership = proven()
    membership.gone(node(1).node_id, 1000)
    broke_ms = 500_000
    membership.connected({node(1).node_id: ""}, broke_ms - 1)
    membership.connected({}, broke_ms)
    assert len(membership.routes(broke_ms + DIAL_PATIENCE_MS - 1)) == 1
    assert membership.rows(broke_ms + GONE_GRACE_MS - 1) != ()
    assert membership.routes(broke_ms + GONE_GRACE_MS) == ()


def test_who_takes_another_code_is_no_longer_dialled() -> None:
    membership = table(node(1))
    membership.routes(0)
    membership.heard(node(1, network=OTHERS), 1000)
    assert membership.routes(1000 + GONE_GRACE_MS) == ()
    assert row(membership, 1, 1000 + GONE_GRACE_MS).why == "it has another join code"


# ---- Limits ------------------------------------------------------------------------------------


def test_a_full_mesh_is_a_reason_and_the_joined_stay() -> None:
    many = [node(number) for number in range(1, MESH_NODES_MAX + 9)]
    membership = table(*many)
    first = membership.routes(0)
    assert len(first) == MESH_NODES_MAX - 1
    membership.connected({dial.node_id: dial.address for dial in first}, 1)
    assert membership.routes(1) == first
    left_out = [r for r in membership.rows(1) if not r.joined]
    assert len(left_out) == 9
    assert {r.why for r in left_out} == {f"the mesh is full: {MESH_NODES_MAX} nodes"}


def test_those_that_never_answer_make_room_for_those_that_may() -> None:
    forged = [node(number) for number in range(100, 100 + MESH_NODES_MAX)]
    membership = table(*forged)
    membership.heard(node(1), 1)
    for now_ms in range(1, 60_000, 1000):
        membership.connected({}, now_ms)
        if "10.0.0.2:4248" in addresses(membership, now_ms):
            return
    pytest.fail("forged advertisements kept a place for ever")


def _flood(count: int) -> Iterable[Advert]:
    for number in range(1000, 1000 + count):
        yield node(number, network=OTHERS if number % 2 else OURS, addresses=("10.6.6.6",))


def test_endless_advertisements_cost_a_bounded_table_and_few_changes() -> None:
    membership = proven()
    changes, before = 0, membership.routes(200)
    for now_ms, forged in enumerate(_flood(5000), start=200):
        membership.heard(forged, now_ms)
        membership.malformed(f"odd {now_ms}", Refusal("odd"), now_ms)
        after = membership.routes(now_ms) if now_ms % 10 == 0 else before
        changes += after != before
        before = after
        assert Dial(node(1).node_id, "10.0.0.2:4248") in after
    assert len(membership.rows(30_000)) <= MEMBERS_MAX + STRANGERS_MAX
    assert membership.strangers_dropped > 5000
    assert changes <= CHANGES_BURST + 5000 // CHANGE_EVERY_MS + 1


def test_flapping_is_waited_out_and_then_the_newest_holds() -> None:
    membership = table(node(1))
    seen = {membership.routes(0)}
    for number in range(1, 1000):
        membership.heard(
            node(1, addresses=(f"10.0.{number % 200}.7",), run=f"{number:08x}"), number
        )
        seen.add(membership.routes(number))
    assert len(seen) <= CHANGES_BURST
    due_ms = membership.next_change_ms(1000)
    assert due_ms is not None
    assert 1000 < due_ms <= 1000 + CHANGE_EVERY_MS
    assert addresses(membership, due_ms) == [f"10.0.{999 % 200}.7:4248"]
    assert membership.next_change_ms(due_ms) is None


_event = st.one_of(
    st.builds(
        lambda n, k, net, v: Heard(
            node(n, addresses=(f"10.0.0.{k}",), run=f"{k:08x}", network=net, version=v)
        ),
        st.integers(0, 6),
        st.integers(1, 4),
        st.sampled_from([OURS, OURS, OTHERS]),
        st.sampled_from([1, 1, 2]),
    ),
    st.builds(lambda n: Gone(f"{n:016x}"), st.integers(0, 6)),
    st.builds(
        lambda names: {f"{n:016x}": f"10.0.0.{k}:4248" if k else "" for n, k in names},
        st.sets(st.tuples(st.integers(1, 6), st.integers(0, 4)), max_size=4),
    ),
)


@settings(max_examples=60)
@given(st.lists(st.tuples(_event, st.integers(0, 20_000)), max_size=40))
def test_whatever_happens_routes_are_sorted_ours_and_kept_while_they_stand(
    events: list[tuple[Heard | Gone | dict[str, str], int]],
) -> None:
    membership, now_ms = table(), 0
    up: dict[str, str] = {}
    for event, pause_ms in events:
        now_ms += pause_ms
        before = {dial.node_id: dial.address for dial in membership.routes(now_ms)}
        if isinstance(event, dict):
            up = event
            membership.connected(up, now_ms)
        else:
            membership.note(event, now_ms)
        routes = membership.routes(now_ms)
        assert routes == tuple(sorted(set(routes)))
        assert routes == membership.routes(now_ms)
        assert len({dial.node_id for dial in routes}) == len(routes) < MESH_NODES_MAX
        assert node(0).node_id not in {dial.node_id for dial in routes}
        after = {dial.node_id: dial.address for dial in routes}
        for node_id in up.keys() & before.keys():
            assert after[node_id] == before[node_id]
        due_ms = membership.next_change_ms(now_ms)
        assert due_ms is None or due_ms > now_ms
        for line in membership.rows(now_ms):
            assert line.joined or line.why
            assert line.joined == (line.node_id in up) or line.network != OURS


def test_what_is_told_by_next_change_is_all_that_time_alone_changes() -> None:
    membership = table(node(1), node(2, addresses=("10.0.0.8", "10.0.0.9")))
    membership.routes(0)
    membership.dial_failed(node(1).node_id, "10.0.0.2:4248", 0)
    membership.gone(node(2).node_id, 50)
    now_ms, changes = 100, 0
    before = membership.routes(now_ms)
    while (due_ms := membership.next_change_ms(now_ms)) is not None:
        assert membership.routes(due_ms - 1) == before
        before, now_ms, changes = membership.routes(due_ms), due_ms, changes + 1
        assert changes < 10
    assert addresses(membership, now_ms) == ["10.0.0.2:4248"]


def test_our_own_move_changes_what_is_near() -> None:
    membership = Membership(node(0, addresses=("10.0.0.1",)))
    membership.moved(replace(node(0), addresses=("192.168.1.1",)))
    membership.heard(node(1, addresses=("10.0.0.2", "192.168.1.2")), 0)
    assert addresses(membership, 0) == ["192.168.1.2:4248"]
