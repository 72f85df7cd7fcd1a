"""Sentences that programs and the kernel write when something known is wrong: what they mean, and the fix. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.doctor.case import Case, Check, Log
from cluster.doctor.memory import DROP_CACHES
from cluster.facts import Unknown
from cluster.finding import Finding, Level
from cluster.yamlcore import printable


@dataclass(frozen=True)
class Sentence:
    """A sentence by its pattern, what it means, and the fix."""

    pattern: re.Pattern[str]
    level: Level
    meaning: str
    fix: str


@dataclass(frozen=True)
class Explained:
    """A line that says a known sentence, and how many lines of the text do."""

    sentence: Sentence
    line: str
    count: int


def _sentence(pattern: str, level: Level, meaning: str, fix: str) -> Sentence:
    return Sentence(re.compile(pattern, re.IGNORECASE), level, meaning, fix)


# The worst first. Words of vLLM, NCCL, the Linux kernel, NVIDIA's driver and earlyoom.
SENTENCES = (
    _sentence(
        r"Driver/library version mismatch",
        Level.FAIL,
        "the driver was updated, and the kernel still runs the old one",
        "sudo reboot",
    ),
    _sentence(
        r"ibv_reg_mr\b.*(ENOMEM|Cannot allocate memory|error 12|errno 12)",
        Level.FAIL,
        "RDMA cannot register memory: a kernel without CMA, or a limit on locked memory",
        "grep CmaTotal /proc/meminfo; ulimit -l",
    ),
    _sentence(
        r"ibv_modify_qp failed",
        Level.FAIL,
        "RDMA found no way to the other node: a GID that has moved, or one set by hand",
        "take NCCL_IB_GID_INDEX out of the inventory, then `sparkctl up`",
    ),
    _sentence(
        r"(NET/IB|Got completion from peer).*(status=12|error 12|vendor err 129)|transport retry counter exceeded",
        Level.FAIL,
        "RDMA sends and nothing comes back: an MTU that differs at the ends, or the cable",
        "sparkctl bench link",
    ),
    _sentence(
        r"Mismatched NCCL version|NCCL version mismatch",
        Level.FAIL,
        "the nodes have different versions of NCCL",
        "sparkctl up",
    ),
    _sentence(
        r"NCCL INFO Using network Socket|NET/Socket : Using",
        Level.FAIL,
        "NCCL fell back from RDMA to TCP",
        "ls /dev/infiniband; ibdev2netdev",
    ),
    _sentence(
        r"NVRM: Xid",
        Level.FAIL,
        "the driver reports a fault of the GPU",
        "sudo reboot; the number after Xid is in https://docs.nvidia.com/deploy/xid-errors",
    ),
    _sentence(
        r"Out of memory: Killed process|oom-kill:|earlyoom.*(sending SIG|SIGTERM|SIGKILL)",
        Level.WARN,
        "memory ran out, and a program was ended",
        "`sparkctl plan RECIPE` says what fits; swap off and earlyoom on keep the box alive",
    ),
    _sentence(
        r"free memory\b.*\bless than desired",
        Level.WARN,
        "CUDA takes the page cache for used memory, though it can be dropped",
        DROP_CACHES,
    ),
    _sentence(
        r"nvme\S*:? .*(I/O error|timeout|reset controller)|(blk_update_request|critical medium error|I/O error, dev)",
        Level.WARN,
        "the disk fails",
        "sudo nvme smart-log /dev/nvme0",
    ),
)


def explain(text: str) -> tuple[Explained, ...]:
    """The known sentences in a text, the worst first, each with its last line: why a job has failed, say."""
    lines = text.splitlines()
    found = ((sentence, [line for line in lines if sentence.pattern.search(line)]) for sentence in SENTENCES)
    return tuple(Explained(sentence, printable(said[-1].strip()[:200]), len(said)) for sentence, said in found if said)


def _logs(case: Case) -> Iterator[Finding]:
    for log in case.logs:
        yield from _told(log)
    if not any(explain(log.text) for log in case.logs):
        evidence = f"{len(case.logs)} looked through: nothing that is known" if case.logs else "there are none of jobs"
        yield Finding("logs", Level.OK, None, evidence)


def _kernel(case: Case) -> Iterator[Finding]:
    for facts in case.seen:
        if isinstance(facts.dmesg, Unknown):
            yield Finding(
                "kernel log",
                Level.UNKNOWN,
                facts.node,
                facts.dmesg.reason,
                f"on {facts.node}: sudo dmesg --level=err,warn",
            )
            continue
        found = list(_told(Log(facts.node, "kernel log", "\n".join(facts.dmesg))))
        yield from found or [
            Finding(
                "kernel log",
                Level.OK,
                facts.node,
                f"{len(facts.dmesg)} of its lines looked through: nothing that is known",
            )
        ]


def _told(log: Log) -> Iterator[Finding]:
    name = "kernel log" if log.name == "kernel log" else "logs"
    for one in explain(log.text):
        times = f" ({one.count} times)" if one.count > 1 else ""
        evidence = f"{one.sentence.meaning}; {log.name} says{times}: {one.line}"
        yield Finding(name, one.sentence.level, log.node, evidence, one.sentence.fix)


CHECKS = (Check(("kernel log",), _kernel), Check(("logs",), _logs))
