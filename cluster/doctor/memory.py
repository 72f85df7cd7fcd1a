"""Memory: what a Spark does when it runs out, what programs can get, and whether RDMA can pin it. Pure.

CPU and GPU share one memory, so a model that does not fit takes the whole box down with it: swapped out it thrashes until nobody
can log in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.doctor.case import of_each
from cluster.facts import Facts, Unknown, known
from cluster.finding import Finding, Level
from cluster.readings.box import Memory, version_numbers

GIB = 1 << 30
MOST_KEPT_FREE = 5  # % of memory: at earlyoom's default of 10, a program with 110 GiB of a Spark's 121.7 is killed
LEAST_SWAP_FREE = 50  # %: at earlyoom's default of 10, the box has long been thrashing
PROTECTED = -500  # the OOM score adjustment that keeps sshd alive; Ubuntu's unit has -1000
MOST_CACHED = 0.25  # of all memory: more, and "free memory on device is less than desired" is what one reads
LEAST_LOCKED = GIB  # bytes that RDMA pins at least
BROKEN_CMA = "7.0.0-1019"  # the kernel on which ibv_reg_mr fails with ENOMEM

_SWAP_OFF = r"sudo swapoff -a && sudo sed -i.bak '/\sswap\s/s/^/#/' /etc/fstab"
_EARLYOOM = (
    "sudo apt install -y earlyoom && echo 'EARLYOOM_ARGS=\"-m 2 -s 80\"' | sudo tee /etc/default/earlyoom"
    " && sudo systemctl enable earlyoom && sudo systemctl restart earlyoom"
)
_SSHD = (
    "sudo mkdir -p /etc/systemd/system/ssh.service.d && printf '[Service]\\nOOMScoreAdjust=-1000\\n'"
    " | sudo tee /etc/systemd/system/ssh.service.d/oom.conf && sudo systemctl daemon-reload && sudo systemctl restart ssh"
)
_MEMLOCK = "echo '* - memlock unlimited' | sudo tee /etc/security/limits.d/90-rdma.conf"
DROP_CACHES = "sync && echo 1 | sudo tee /proc/sys/vm/drop_caches"


def _swap(facts: Facts) -> Iterator[Finding]:
    if isinstance(facts.swaps, Unknown):
        yield Finding("swap", Level.UNKNOWN, facts.node, f"swap: {facts.swaps.reason}")
    elif not facts.swaps:
        yield Finding("swap", Level.OK, facts.node, "no swap: what does not fit is ended, and the box goes on")
    else:
        total = facts.memory.swap_total / GIB if isinstance(facts.memory, Memory) else 0.0
        said = f"{total:.1f} GiB of swap ({', '.join(facts.swaps)})"
        kept = _kept_free(facts)
        if isinstance(kept, Unknown):
            yield Finding("swap", Level.UNKNOWN, facts.node, f"{said}; earlyoom: {kept.reason}")
        elif kept is not None and kept[1] >= LEAST_SWAP_FREE:
            evidence = f"{said}, and earlyoom acts when less than {kept[1]} % of it is free"
            yield Finding("swap", Level.OK, facts.node, evidence)
        else:
            evidence = f"{said}: out of memory, the box thrashes and freezes"
            yield Finding("swap", Level.WARN, facts.node, evidence, f"on {facts.node}: {_SWAP_OFF}")


def _earlyoom(facts: Facts) -> Iterator[Finding]:
    kept, fix = _kept_free(facts), f"on {facts.node}: {_EARLYOOM}"
    if isinstance(kept, Unknown):
        yield Finding("earlyoom", Level.UNKNOWN, facts.node, f"earlyoom: {kept.reason}")
    elif kept is None:
        evidence = "earlyoom does not run: the kernel acts minutes after the box has frozen"
        yield Finding("earlyoom", Level.WARN, facts.node, evidence, fix)
    elif kept[0] > MOST_KEPT_FREE:
        total = facts.memory.total * kept[0] / 100 / GIB if isinstance(facts.memory, Memory) else 0.0
        evidence = f"earlyoom keeps {kept[0]} % free: it ends programs that leave less than {total:.0f} GiB"
        yield Finding("earlyoom", Level.WARN, facts.node, evidence, fix)
    else:
        yield Finding("earlyoom", Level.OK, facts.node, f"earlyoom runs with -m {kept[0]} -s {kept[1]}")


def _kept_free(facts: Facts) -> tuple[int, int] | Unknown | None:
    """At how many % of free memory and of free swap earlyoom acts (10 and 10 by itself); None where it does not run."""
    if isinstance(facts.units, Unknown):
        return facts.units
    unit = facts.unit("earlyoom.service")
    if unit is None or unit.active != "active":
        return None
    if isinstance(facts.earlyoom, Unknown):
        return facts.earlyoom
    found = [re.search(rf"(?:^|\s)-{option}\s*(\d{{1,3}})", facts.earlyoom or "") for option in "ms"]
    return (int(found[0][1]) if found[0] else 10), (int(found[1][1]) if found[1] else 10)


def _sshd(facts: Facts) -> Iterator[Finding]:
    unit = facts.unit("ssh.service") or facts.unit("sshd.service")
    if isinstance(facts.units, Unknown):
        yield Finding("sshd", Level.UNKNOWN, facts.node, f"sshd's OOM score: {facts.units.reason}")
    elif unit is None or unit.oom_score_adjust is None:
        yield Finding(
            "sshd", Level.UNKNOWN, facts.node, "sshd is no unit of systemd here, so its OOM score is not known"
        )
    elif unit.oom_score_adjust > PROTECTED:
        evidence = f"{unit.name} has OOMScoreAdjust={unit.oom_score_adjust}: out of memory, you may lose your way in"
        yield Finding("sshd", Level.WARN, facts.node, evidence, f"on {facts.node}: {_SSHD}")
    else:
        yield Finding("sshd", Level.OK, facts.node, f"{unit.name} has OOMScoreAdjust={unit.oom_score_adjust}")


def _memory(facts: Facts) -> Iterator[Finding]:
    memory = facts.memory
    if isinstance(memory, Unknown):
        yield Finding("memory", Level.UNKNOWN, facts.node, f"memory: {memory.reason}")
        return
    said = f"{memory.allocatable / GIB:.1f} of {memory.total / GIB:.1f} GiB can be had"
    if memory.huge_total:
        evidence = f"{said}: {memory.huge_total / GIB:.1f} GiB are set aside as huge pages, which models do not use"
        yield Finding("memory", Level.WARN, facts.node, evidence, f"on {facts.node}: sudo sysctl vm.nr_hugepages=0")
    elif memory.allocatable < memory.total / 2:
        users = [f"{one.name} ({(one.memory or 0) / 1024:.0f} GiB)" for one in known(facts.gpu_processes, ())]
        evidence = f"{said}; on the GPU: {', '.join(users) or 'nobody'}"
        yield Finding("memory", Level.WARN, facts.node, evidence, f"on {facts.node}: ps aux --sort=-rss | head")
    else:
        yield Finding("memory", Level.OK, facts.node, said)


def _page_cache(facts: Facts) -> Iterator[Finding]:
    memory = facts.memory
    if isinstance(memory, Unknown) or memory.free is None:
        yield Finding("page cache", Level.UNKNOWN, facts.node, "how much memory the page cache has is not known")
        return
    said = f"the page cache has {memory.cached / GIB:.1f} GiB"
    if facts.has_cuda and memory.cached > MOST_CACHED * memory.total:
        evidence = f"{said}: programs that ask CUDA, as vLLM does, see only {memory.free / GIB:.1f} GiB free"
        yield Finding("page cache", Level.WARN, facts.node, evidence, f"on {facts.node}: {DROP_CACHES}")
    else:
        yield Finding("page cache", Level.OK, facts.node, said)


def _cma(facts: Facts) -> Iterator[Finding]:
    memory, kernel = facts.memory, known(facts.kernel, None)
    if isinstance(memory, Unknown) or kernel is None:
        yield Finding(
            "cma", Level.UNKNOWN, facts.node, "whether the kernel keeps contiguous memory for RDMA is not known"
        )
    elif memory.cma == 0 and (version_numbers(kernel) or ()) >= (7, 0):
        seen = kernel.startswith(BROKEN_CMA)
        fix = "sudo sed -i 's/^GRUB_CMDLINE_LINUX=\"/&kho=off /' /etc/default/grub && sudo update-grub && sudo reboot"
        evidence = f"CmaTotal is 0 kB with kernel {kernel}: RDMA cannot register memory (ibv_reg_mr: ENOMEM)"
        yield Finding("cma", Level.FAIL if seen else Level.WARN, facts.node, evidence, f"on {facts.node}: {fix}")
    else:
        shown = "has no CmaTotal" if memory.cma is None else f"has CmaTotal {memory.cma >> 10} kB"
        yield Finding("cma", Level.OK, facts.node, f"kernel {kernel} {shown}")


def _memlock(facts: Facts) -> Iterator[Finding]:
    if isinstance(facts.limits, Unknown):
        yield Finding("memlock", Level.UNKNOWN, facts.node, f"the limit of locked memory: {facts.limits.reason}")
    elif 0 <= facts.limits.memlock < LEAST_LOCKED and known(facts.roce, ()):
        evidence = f"a login may lock {facts.limits.memlock >> 10} KiB: RDMA can register no more (ibv_reg_mr: ENOMEM)"
        yield Finding("memlock", Level.WARN, facts.node, evidence, f"on {facts.node}: {_MEMLOCK}, then log in again")
    else:
        shown = "all memory" if facts.limits.memlock < 0 else f"{facts.limits.memlock / GIB:.1f} GiB"
        yield Finding("memlock", Level.OK, facts.node, f"a login may lock {shown}")


CHECKS = (
    of_each("memory", _memory),
    of_each("page cache", _page_cache),
    of_each("swap", _swap),
    of_each("earlyoom", _earlyoom),
    of_each("sshd", _sshd),
    of_each("cma", _cma),
    of_each("memlock", _memlock),
)
