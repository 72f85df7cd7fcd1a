"""Two ranks, started as a job's are, reduce a tensor together over the link: that they can, how fast, and by which interfaces.

The ranks' side is cluster.reducer, out of the code that `up` has shipped. What fails is part of the result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

from cluster.errors import FailedError
from cluster.measurement import Collective, Wire
from cluster.transport import Transport
from cluster.transport.process import Session
from cluster.yamlcore import printable

# Bytes of the tensor by backend. NCCL reaches its speed from about 1 GiB on, and 16 GB have frozen boxes.
SIZES = {"nccl": 1 << 30, "gloo": 32 << 20}
ROUNDS = 6
LOADING = 240.0  # seconds for torch to be imported on a busy node, beyond the rounds' own
WAITING = 60.0  # seconds that a rank waits for the other


def measure(
    transports: Sequence[Transport],
    pythons: Sequence[str],
    codes: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    wires: Sequence[Wire],
    *,
    sizes: Mapping[str, int] = SIZES,
    waiting: float = WAITING,
) -> Collective:
    """Have the ranks of both nodes sum a tensor. A failure is told in the result's `error`.

    Args:
        pythons: the interpreter of each node's ranks, by rank; likewise `codes`, the folder of our code, and `environments`.
        wires: the rails, whose interfaces and devices are to carry it.
        sizes: bytes of the tensor, by backend.
        waiting: seconds that a rank waits for the other.
    """
    with ExitStack() as stack:
        try:
            sessions = [
                stack.enter_context(transport.session(argv(python, code)))
                for transport, python, code in zip(transports, pythons, codes, strict=True)
            ]
            port = _port(sessions[0], transports[0].name, environments[0]["MASTER_ADDR"])

            def reduce(rank: int) -> dict[str, Any]:
                order = {"environment": dict(environments[rank]), "port": port, "size": dict(sizes)}
                order |= {"rounds": ROUNDS, "seconds": waiting}
                return _ask(sessions[rank], transports[rank].name, "reduce", waiting + LOADING, **order)

            with ThreadPoolExecutor(2) as pool:
                futures = [pool.submit(partial(reduce, rank)) for rank in (0, 1)]
                answers = [future.result() for future in futures]
            return read((answers[0], answers[1]), wires)
        except FailedError as error:
            return Collective("", 0, 0.0, error=printable(error.message[:300]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # a node is broken, or hostile
            said = printable(f"{type(error).__name__}: {error}"[:200])
            return Collective("", 0, 0.0, error=f"a rank's answer makes no sense ({said})")


def argv(python: str, code: str) -> list[str]:
    """The command that starts a node's rank; what lies in the folder where it starts does not pass for a module."""
    return ["env", f"PYTHONPATH={code}", python, "-P", "-m", "cluster.reducer"]


def _port(session: Session, node: str, address: str) -> int:
    answer = _ask(session, node, "listen", LOADING, address=address)
    if answer["error"]:
        raise FailedError(f"{node}: {address}: {answer['error']}", "sparkctl up")
    return int(answer["port"])


def _ask(session: Session, node: str, order: str, within: float, **arguments: object) -> dict[str, Any]:
    answer = json.loads(session.ask(json.dumps([order, arguments]).encode(), timeout=within))
    if "done" not in answer:
        raise FailedError(f"{node}: {answer['failed']}", "sparkctl doctor")
    done: dict[str, Any] = answer["done"]
    return done


def read(answers: tuple[dict[str, Any], dict[str, Any]], wires: Sequence[Wire]) -> Collective:
    """What both ranks told, as one: the slower one's time, and of the bytes those of the rank whose rails carried less.

    Of two ranks each sends as many bytes as the tensor has, every round: 2 (n - 1) / n of them, by a ring of n.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it makes no sense.
    """
    size, seconds = int(answers[0]["size"]), max(float(answer["seconds"]) for answer in answers)
    backend = str(answers[0]["backend"])
    if backend not in SIZES or not size > 0 or not 0 < seconds < LOADING * 10:
        raise ValueError(f"{backend}, {size} bytes, {seconds} s")
    carried, by = [], []
    for rank, answer in enumerate(answers):
        sent = {str(name): int(count) for name, count in answer["sent"].items()}
        ours = {wire.interfaces[rank] for wire in wires} | {wire.hcas[rank] for wire in wires}
        carried.append(sum(count for name, count in sent.items() if name in ours))
        others = {name: count for name, count in sent.items() if name not in ours}
        by.append(max(others, key=lambda name: others[name], default=""))
    least = carried.index(min(carried))
    return Collective(
        backend,
        size,
        bus=size * ROUNDS / seconds / 1e9,
        moved=size * ROUNDS,
        carried=carried[least],
        astray=by[least],
        error="" if all(answer["right"] is True for answer in answers) else "the sum is wrong",
    )
