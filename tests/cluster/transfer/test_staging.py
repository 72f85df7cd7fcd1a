"""A folder appears whole or not at all; bytes come from where the manifest says, and no path leads out."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import stream, transfer
from cluster.errors import FailedError, RefusedError
from cluster.transfer import copier
from cluster.transfer.digests import SHA256, XXH3, common, usable
from cluster.transfer.manifest import CHUNK, Chunk, Manifest, Piece, Target, UnsafePathError, plain, whole
from cluster.transfer.pulling import Connection, Here, Pull, SourceError
from cluster.transfer.shelf import ASK, NO, SAID, Shelf
from cluster.transfer.staging import BusyError, DamagedError, NoRoomError, Staging
from cluster.transport.local import LocalTransport

TOKEN = b"t" * 32


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "large").write_bytes(os.urandom(2 * CHUNK + 12345))
    (folder / "small").write_bytes(b"small")
    (folder / "empty").touch()
    return folder


def parts(source: Path) -> Manifest:
    size = (source / "large").stat().st_size
    cut = Target("cut/half", 4 + 10 + 20, b"head", (Piece(4, "large", CHUNK - 5, 10), Piece(14, "large", 7, 20)))
    return Manifest((whole("large", size), whole("small", 5, at="renamed"), whole("empty", 0), cut))


def assert_made(folder: Path, source: Path) -> None:
    large = (source / "large").read_bytes()
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "cut/half", "empty", "large", "renamed",
    ]  # fmt: skip
    assert (folder / "large").read_bytes() == large
    assert (folder / "cut/half").read_bytes() == b"head" + large[CHUNK - 5 : CHUNK + 5] + large[7:27]
    assert (folder / "renamed").read_bytes() == b"small"
    assert (folder.stat().st_mode | (folder / "large").stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("how", ["over_link", "from an environment", "from_here", "within"])
def test_files_and_ranges_of_files_arrive(how: str, source: Path, tmp_path: Path) -> None:
    final, seen = tmp_path / "home" / "made", list[transfer.Progress]()
    carry(how)(source, final, parts(source), seen.append)
    assert_made(final, source)
    assert (seen[-1].done, seen[-1].total) == (parts(source).moved, parts(source).moved)
    assert [path.name for path in final.parent.iterdir()] == ["made"]
    again = list[transfer.Progress]()
    carry(how)(source, final, parts(source), again.append)  # it is there
    assert [one.done for one in again] == [parts(source).moved]


def carry(how: str) -> Callable[[Path, Path, Manifest, transfer.Watch], None]:
    node = LocalTransport("node")
    end = transfer.End(node, ("127.0.0.1", "127.0.0.1"))
    if how in {"over_link", "from an environment"}:
        end = replace(end, python=sys.executable if how == "from an environment" else "")
        return lambda source, final, what, watch: transfer.over_link(end, str(source), end, str(final), what, watch)
    act = getattr(transfer, how)
    return lambda source, final, what, watch: act(str(source), node, str(final), what, watch)


def test_what_has_arrived_is_verified_and_not_fetched_again(source: Path, tmp_path: Path) -> None:
    what, final = parts(source), tmp_path / "made"
    chunks = list(what.chunks())
    staging = Staging(str(final), what)
    staging.begin()
    half = Pull(staging)
    half.run([_Some(Here(Shelf(str(source))), 2)])
    assert half.error is not None
    assert not final.exists()
    with (tmp_path / ".made.part" / "large").open("r+b") as file:  # the power went off before it was on the disk
        file.seek(CHUNK + 100)
        file.write(b"\0" * 100)
    again = Staging(str(final), what)
    again.begin()
    assert [chunk.number for chunk in again.missing()] == [chunk.number for chunk in chunks[1:]]
    rest = Pull(again)
    rest.run([Here(Shelf(str(source)))])
    assert rest.error is None
    assert_made(final, source)


class _Some:
    """A way that is lost after some chunks."""

    def __init__(self, way: Here, count: int) -> None:
        self._way, self._left = way, count

    def fetch(
        self, take: Callable[[bool], Chunk | None], staging: Staging, arrived: Callable[[Chunk, int], None]
    ) -> None:
        def some(wait: bool) -> Chunk | None:
            if not self._left:
                raise ConnectionError(0, "lost")
            self._left -= 1
            return take(wait)

        self._way.fetch(some, staging, arrived)


def test_a_way_that_is_lost_leaves_its_part_to_the_others(source: Path, tmp_path: Path) -> None:
    staging = Staging(str(tmp_path / "made"), parts(source))
    staging.begin()
    pull, here = Pull(staging), Here(Shelf(str(source)))
    pull.run([_Some(here, 0), _Some(here, 1), here])
    assert pull.error is None
    assert_made(tmp_path / "made", source)


def test_another_manifest_begins_anew(source: Path, tmp_path: Path) -> None:
    staging = Staging(str(tmp_path / "made"), parts(source))
    staging.begin()
    Pull(staging).run([_Some(Here(Shelf(str(source))), 3)])
    other = Staging(str(tmp_path / "made"), Manifest((whole("small", 5),)))
    other.begin()
    Pull(other).run([Here(Shelf(str(source)))])
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["small"]


def test_two_transfers_do_not_fill_one_folder(source: Path, tmp_path: Path) -> None:
    first = Staging(str(tmp_path / "made"), parts(source))
    first.begin()
    with pytest.raises(BusyError, match="is being filled"):
        Staging(str(tmp_path / "made"), parts(source)).begin()
    first.close()
    Staging(str(tmp_path / "made"), parts(source)).begin()


def test_a_disk_without_room_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    what = Manifest((whole("large", 1 << 50),))
    with pytest.raises(NoRoomError):
        Staging(str(tmp_path / "made"), what).begin()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RefusedError) as refused:
        carry("from_here")(tmp_path, tmp_path / "made", what, lambda _: None)
    assert refused.value.message.startswith("node: no room for made: it takes 1048576.1 GiB, and ")
    assert "sparkctl clean" in refused.value.fix


def test_a_file_that_is_not_what_its_source_says_is_not_taken(source: Path, tmp_path: Path) -> None:
    what = Manifest((whole("small", 5, sha256="0" * 64),))
    staging = Staging(str(tmp_path / "made"), what)
    staging.begin()
    pull = Pull(staging)
    pull.run([Here(Shelf(str(source)))])
    assert isinstance(pull.error, DamagedError)
    assert not (tmp_path / "made").exists()
    again = Staging(str(tmp_path / "made"), what)
    again.begin()
    assert len(again.missing()) == 1


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "", "a\0b", "x" * 5000])
def test_paths_that_lead_out_are_refused_on_both_sides(path: str, source: Path) -> None:
    with pytest.raises(UnsafePathError):
        plain(path)
    with pytest.raises(UnsafePathError):
        Manifest.from_json(Manifest((Target(path, 0, b"", ()),)).to_json())
    with pytest.raises(UnsafePathError):
        Manifest.from_json(Manifest((Target("a", 1, b"", (Piece(0, path, 0, 1),)),)).to_json())
    with pytest.raises(ValueError, match="no path below"):
        Shelf(str(source)).open(path)


def test_a_link_that_leads_out_is_refused_and_one_of_a_hubs_cache_is_not(source: Path, tmp_path: Path) -> None:
    (source / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("secret")
    (source / "in").symlink_to("small")
    shelf = Shelf(str(source))
    assert shelf.open("in").read() == b"small"
    with pytest.raises(ValueError, match="leads out of"):
        shelf.open("out")
    cache = tmp_path / "models--org--model"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "1234").write_text("weights")
    (cache / "snapshots" / "main").mkdir(parents=True)
    (cache / "snapshots" / "main" / "weights").symlink_to("../../blobs/1234")
    (cache / "snapshots" / "main" / "out").symlink_to(tmp_path / "secret")
    snapshot = Shelf(str(cache / "snapshots" / "main"))
    assert snapshot.open("weights").read() == b"weights"
    with pytest.raises(ValueError, match="leads out of"):
        snapshot.open("out")


def test_pieces_must_join() -> None:
    for pieces in ((Piece(0, "a", 0, 4),), (Piece(5, "a", 0, 5),), (Piece(0, "a", 0, 3), Piece(2, "a", 0, 8))):
        with pytest.raises(ValueError, match="do not"):
            Manifest((Target("b", 10, b"", pieces),)).check()


# What listens.


def test_who_does_not_know_the_token_gets_nothing(source: Path, tmp_path: Path) -> None:
    (told,) = copier.Copier().offer(str(source), ["127.0.0.1"], TOKEN.hex())["doors"]
    staging = Staging(str(tmp_path / "made"), parts(source))
    staging.begin()
    pull = Pull(staging)

    def wrong() -> socket.socket:
        return stream.connect("127.0.0.1", "127.0.0.1", told["port"], b"o" * 32)

    pull.run([Connection(wrong)])
    assert isinstance(pull.error, stream.StrangerError)
    assert pull.done == 0
    with socket.create_connection(("127.0.0.1", told["port"])) as silent:
        stream.exactly(silent, 32)
        silent.sendall(b"\0" * 64)
        assert silent.recv(100) == b""


def test_a_source_says_why_it_does_not_give(source: Path) -> None:
    (told,) = copier.Copier().offer(str(source), ["127.0.0.1"], TOKEN.hex())["doors"]
    for path, size, why in (
        ("absent", 1, "No such file"),
        ("../x", 1, "no path below"),
        ("small", 6, "is shorter than it was"),
    ):
        with stream.connect("127.0.0.1", "127.0.0.1", told["port"], TOKEN) as connection:
            connection.sendall(ASK.pack(len(path), 0, size, 1) + path.encode())
            status, length = SAID.unpack(stream.exactly(connection, SAID.size))
            assert status == NO
            assert why in stream.exactly(connection, length).decode()


@pytest.mark.parametrize(
    "garbage", [ASK.pack(5000, 0, 1, 0), ASK.pack(1, 0, 1 << 40, 0), ASK.pack(1, 0, 1, 7), b"GET / HTTP/1.1\r\n\r\n"]
)
def test_garbage_ends_a_connection(garbage: bytes, source: Path) -> None:
    (told,) = copier.Copier().offer(str(source), ["127.0.0.1"], TOKEN.hex())["doors"]
    with stream.connect("127.0.0.1", "127.0.0.1", told["port"], TOKEN) as connection:
        connection.sendall(garbage.ljust(ASK.size, b"\0"))
        assert connection.recv(100) == b""


def test_nothing_listens_on_every_address() -> None:
    with pytest.raises(ValueError, match="one address"):
        copier.Door("0.0.0.0", TOKEN, lambda connection: None)  # noqa: S104 - what is refused


def test_the_digest_is_the_fastest_that_both_sides_can_compute() -> None:
    assert usable() == (XXH3, SHA256)
    assert common(["xxh3", "sha256"]) == XXH3
    assert common(["sha256"]) == SHA256
    assert common([]) == SHA256  # every Python has it


@pytest.mark.parametrize("digest", [XXH3, SHA256])
def test_bytes_that_were_changed_on_the_way_are_asked_for_again(digest: str, source: Path, tmp_path: Path) -> None:
    shelf, spoilt = Shelf(str(source)), [True]

    def serve(connection: socket.socket) -> None:
        if spoilt.pop() if spoilt else False:
            length, _, size, _ = ASK.unpack(stream.exactly(connection, ASK.size))
            stream.exactly(connection, length)
            connection.sendall(SAID.pack(0, size) + b"\0" * size + b"\0" * 32)
            connection.close()
        else:
            shelf.serve(connection)

    def open_() -> socket.socket:
        ours, theirs = socket.socketpair()
        threading.Thread(target=serve, args=(theirs,), daemon=True).start()
        return ours

    staging = Staging(str(tmp_path / "made"), parts(source))
    staging.begin()
    pull = Pull(staging)
    pull.run([Connection(open_, digest)])
    assert pull.error is None
    assert not spoilt
    assert_made(tmp_path / "made", source)


def test_a_source_that_lost_its_file_fails_at_once_with_its_words(source: Path, tmp_path: Path) -> None:
    what = parts(source)
    (source / "large").unlink()
    with pytest.raises(FailedError) as failed:
        carry("over_link")(source, tmp_path / "made", what, lambda _: None)
    assert failed.value.message == "node: made could not be copied: No such file or directory"
    assert isinstance(SourceError(0, "x"), OSError)
