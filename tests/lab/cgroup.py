"""Control groups of the hosts: one tree for systemd to live in, and a memory limit from whichever version offers one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hierarchies:
    """Where this machine's control groups are mounted; ``memory`` is the version 1 memory controller's, at our own place."""

    unified: Path | None
    memory: Path | None

    def limits_memory(self) -> bool:
        return self.memory is not None or (self.unified is not None and _offers_memory(self.unified))


def hierarchies() -> Hierarchies:
    """Read the mounts and our own membership."""
    ours = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    unified = memory = None
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2":
            unified = Path(where)
        elif kind == "cgroup" and "memory" in options.split(","):
            memory = _within(Path(where), ours.get("memory", "/"))
    return Hierarchies(unified, memory)


def _within(mount: Path, group: str) -> Path:
    """Our own group below a mount: a container may show us the mount's root only."""
    ours = mount / group.lstrip("/")
    return ours if ours.is_dir() else mount


def _offers_memory(unified: Path) -> bool:
    return "memory" in (unified / "cgroup.subtree_control").read_text().split()


@dataclass(frozen=True)
class Cgroup:
    """One host's groups. ``unified`` becomes the root of the host's cgroup namespace; ``memory`` is version 1's."""

    unified: Path | None
    memory: Path | None
    limit: int | None

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(folder for folder in (self.unified, self.memory) if folder)

    @property
    def usage(self) -> Path | None:
        """The folder whose files tell how much memory the host uses; None where it has no limit."""
        return (self.memory or self.unified) if self.limit else None

    def create(self) -> None:
        for folder in self.folders:
            folder.mkdir(exist_ok=True)
        if self.limit is None:
            return
        if self.memory:
            (self.memory / "memory.limit_in_bytes").write_text(str(self.limit))
        elif self.unified:
            (self.unified / "memory.max").write_text(str(self.limit))
            (self.unified / "memory.swap.max").write_text("0")

    def enter(self, argv: list[str], *, inside: bool = False) -> list[str]:
        """The argv that joins the groups and becomes ``argv``.

        ``inside``: join a running host. Version 2 lets no process live beside groups with controllers, so it gets its own.
        """
        folders = list(self.folders)
        if inside and self.unified:
            folders[0] = self.unified / "visitors"
            folders[0].mkdir(exist_ok=True)
        if not folders:
            return argv
        script = 'while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs"; shift; done; shift; exec "$@"'
        return ["sh", "-c", script, "sh", *map(str, folders), "--", *argv]


def plan(name: str, limit: int | None, systemd: bool) -> Cgroup:
    """The groups of the host ``name``; nothing is made yet.

    systemd needs a version 2 tree of its own even where it has no controllers; a limit needs a memory controller.
    """
    here = hierarchies()
    if limit is not None and not here.limits_memory():
        raise RuntimeError("this kernel offers no memory controller: start the lab without memory=")
    on_v2 = limit is not None and here.memory is None
    return Cgroup(
        unified=here.unified / name if here.unified and (systemd or on_v2) else None,
        memory=here.memory / name if here.memory and limit is not None else None,
        limit=limit,
    )
