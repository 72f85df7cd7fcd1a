"""Cuts the power in the middle of a change, at each point where that could matter, and says whether it can be mended.

    python -m tests.cluster.crash FOLDER

Before each call to the system that changes something, in turn, a process that applies changes (then: undoes them) dies. Another
does what the next `up` or `down` would. Prints how many points there were; exits with what was different from before at the first
that could not be mended. In a program of its own, because it forks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.acts import Place
from cluster.changes import Change, CommandChange, FileChange, LinesChange, MakeChange, SettingChange, TreeChange
from cluster.journal import Journal
from tests.cluster.tarball import tarball
from tests.cluster.tree import snapshot

CALLS = ("fsync", "replace", "unlink", "mkdir", "rmdir", "posix_fallocate", "ftruncate")
CUT = 9
NEVER = 1 << 30
Kinds = Callable[[Path], tuple[Change, ...]]
Act = Callable[[Path, Kinds], None]


def silent(host: Path) -> tuple[Change, ...]:
    """Changes that run nothing, which is quick."""
    return (
        SettingChange("MTU", str(host / "mtu"), "9000", root=False),
        FileChange(str(host / "etc" / "made" / "for" / "this"), b"\0\xff"),
        LinesChange(str(host / "hosts"), ("192.168.100.2 spark-b",), "link"),
        LinesChange("~/.ssh/authorized_keys", ("key a", "key b"), "pair"),
        TreeChange("$SPARKCTL_HOME/code/abc", tarball({"cluster/x.py": b"x", "run": b"#!"})),
    )


def running(host: Path) -> tuple[Change, ...]:
    """Changes that run commands."""
    tool, flag = host / "etc" / "40-cx7.yaml", host / "lingers"
    return (
        FileChange(str(tool), b"new\n", mode=0o600, reload=(("cp", str(tool), str(host / "applied")),)),
        CommandChange("linger", ("touch", str(flag)), ("rm", str(flag)), ("ls", str(flag)), str(flag)),
        MakeChange("make a key", ("~/keys/k", "~/keys/k.pub"), ("cp", "-r", str(host / "prototype") + "/.", "~/keys")),
    )


def furnish(host: Path) -> None:
    """The host as it was before."""
    for folder in ("etc", "home", "prototype"):
        (host / folder).mkdir(parents=True)
    for name, text in (
        ("mtu", "1500\n"),
        ("etc/40-cx7.yaml", "old"),
        ("hosts", "127.0.0.1 localhost"),
        ("applied", "old"),
    ):
        (host / name).write_text(text)
    (host / "etc/40-cx7.yaml").chmod(0o640)
    (host / "prototype/k").write_text("secret")
    (host / "prototype/k.pub").write_text("public")


def apply(host: Path, changes: Kinds) -> None:
    journal = Journal(Place(host / "home", host / "home" / ".sparkctl"))
    assert journal.lock("test") is None
    journal.begin("run", "test")
    for change in changes(host):
        (state,), _ = journal.look((change,))
        journal.apply(change, state)
    journal.commit()


def undo(host: Path, changes: Kinds) -> None:
    journal = Journal(Place(host / "home", host / "home" / ".sparkctl"))
    assert journal.lock("test") is None
    for entry in reversed(journal.books().entries):
        assert journal.undo(entry.number, False).done
    journal.commit()


def dies(act: Act, host: Path, changes: Kinds, at: int) -> bool:
    """Have `act` done by a process that dies before its call number `at`; False if it has ended before that."""
    pid = os.fork()
    if pid == 0:
        _cut_power(at)
        act(host, changes)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, CUT), f"point {at} of {act.__name__}: exit status {code}"
    return code == CUT


def _cut_power(at: int) -> None:
    left = at

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def die_or(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(CUT)
            return call(*arguments, **options)

        return die_or

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    subprocess.Popen = counted(subprocess.Popen)  # type: ignore[assignment, misc]


def outside(host: Path) -> dict[str, tuple[object, ...]]:
    """All but sparkctl's own folder, and what a reload has copied: the times of a copy are its own."""
    seen = snapshot(host)
    for path in list(seen):
        if path.startswith(str(host / "home" / ".sparkctl")):
            del seen[path]
        elif path == str(host / "applied"):
            seen[path] = seen[path][4:]
        elif path == str(host / "mtu"):
            seen[path] = (*seen[path][:3], *seen[path][4:])
    return seen


def main() -> None:
    folder = Path(sys.argv[1])
    # No power is really cut: only the order of things matters, and this takes longest.
    os.fsync = lambda fd: None
    points = {
        f"{act.__name__} {changes.__name__}": mend(folder, act, changes)
        for act in (apply, undo)
        for changes in (silent, running)
    }
    print(points)


def mend(folder: Path, act: Act, changes: Kinds) -> int:
    """Cut the power at every point of an act; how many there are."""
    host, origin = folder / "host", folder / "origin"
    furnish(host)
    before = outside(host)
    if act is undo:
        dies(apply, host, changes, NEVER)
    host.rename(origin)
    at, more = 0, True
    while more:
        at += 1
        shutil.copytree(origin, host)
        more = dies(act, host, changes, at)
        dies(undo, host, changes, NEVER)
        after = outside(host)
        if after != before:
            sys.exit(f"point {at} of {act.__name__}: {set(after.items()) ^ set(before.items())}")
        left = [path.name for path in (host / "home" / ".sparkctl" / "journal").iterdir()]
        assert left == ["lock"], f"point {at} of {act.__name__}: {left}"
        shutil.rmtree(host)
    shutil.rmtree(origin)
    return at


if __name__ == "__main__":
    main()
