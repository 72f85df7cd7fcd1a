"""Words between two agents: believed only from one that knows the key, is there now, and says something new."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator

import pytest

from launch.agent.wire import Path, Wire

pytestmark = pytest.mark.timeout(60)

PORT = 29871
RAILS = [("127.0.7.1", "127.0.7.2", 0), ("127.0.8.1", "127.0.8.2", 1)]


def wire(side: int, key: str = "key", *, rails: int = 2) -> Wire:
    paths = [Path(*(ends if side == 0 else (ends[1], ends[0])), number) for *ends, number in RAILS[:rails]]
    return Wire(key, "job", side, paths, PORT)


@pytest.fixture
def both() -> Iterator[tuple[Wire, Wire]]:
    head, peer = wire(0), wire(1)
    yield head, peer
    head.close()
    peer.close()


def take(listener: Wire, within: float = 0.5) -> bool:
    """Whether anything new came; ends as soon as it did."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        heard = [listener.take(one) for one in listener.sockets]
        if any(heard):
            return True
        time.sleep(0.01)
    return False


def acquaint(head: Wire, peer: Wire) -> None:
    """Each hears of the other's session, then believes."""
    head.tell({"n": 0})
    assert not take(peer, 0.2)  # it does not echo the peer's session yet
    peer.tell({"n": 0})
    assert take(head)
    head.tell({"n": 1})
    assert take(peer)


def test_both_believe_each_other_after_a_round(both: tuple[Wire, Wire]) -> None:
    head, peer = both
    acquaint(head, peer)
    assert peer.body == {"n": 1}
    assert peer.silence() < 5 and peer.silence_of(1) < 5


def test_a_stranger_is_not_heard(both: tuple[Wire, Wire]) -> None:
    head, peer = both
    acquaint(head, peer)
    head.close()
    stranger = wire(0, "another key")
    try:
        for _ in range(3):
            stranger.tell({"n": 99})
            assert not take(peer, 0.1)
    finally:
        stranger.close()
    assert peer.body == {"n": 1}


def test_what_was_recorded_is_not_believed_again(both: tuple[Wire, Wire]) -> None:
    head, peer = both
    acquaint(head, peer)
    (at_peer,) = [one for one, path in peer.sockets.items() if path.rail == 0]
    head.tell({"n": 2})
    assert select.select([at_peer], [], [], 5)[0]
    recorded = at_peer.recv(8192)  # before the peer's own eyes
    assert take(peer)  # the same came by the other rail
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as replay:
        replay.sendto(recorded, ("127.0.7.2", PORT))
    assert not take(peer, 0.2)
    peer.close()
    later = wire(1)  # the peer's agent has come back: nothing of the old session counts
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as replay:
            replay.sendto(recorded, ("127.0.7.2", PORT))
        assert not take(later, 0.2)
        assert later.body is None
    finally:
        later.close()


def test_an_agent_that_has_come_back_is_believed_after_a_round(both: tuple[Wire, Wire]) -> None:
    head, peer = both
    acquaint(head, peer)
    peer.close()
    back = wire(1)
    try:
        back.tell({"n": 10})
        take(head, 0.2)
        head.tell({"n": 3})
        assert take(back)
        back.tell({"n": 11})
        assert take(head)
        assert head.body == {"n": 11}
    finally:
        back.close()


def test_one_rail_is_enough_and_the_other_is_known_to_be_silent(both: tuple[Wire, Wire]) -> None:
    head, peer = both
    acquaint(head, peer)
    (dark,) = [one for one, path in head.sockets.items() if path.rail == 1]
    before = peer.silence_of(1)
    del head.sockets[dark]
    dark.close()
    time.sleep(0.3)
    head.tell({"n": 5})
    assert take(peer)
    assert peer.silence_of(0) < peer.silence_of(1)
    assert peer.silence_of(1) >= before + 0.3
