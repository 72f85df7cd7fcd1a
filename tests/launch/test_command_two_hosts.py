"""`kind: command` over two hosts: a web server on each, brought to the laptop, and a script under torchrun."""

from __future__ import annotations

import http.client
import json
from contextlib import suppress
from typing import Any

import pytest

from tests.laptop import Laptop

pytestmark = pytest.mark.timeout(400)

PORT = 18123
# Prints what the ranks made of 1 and 2, and over which addresses of the link they are joined.
REDUCES = """
import os
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
value = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(value)
print("the sum is", value.item(), "of", dist.get_world_size(), "met at", os.environ["MASTER_ADDR"], flush=True)
dist.destroy_process_group()
"""


def recipe(laptop: Laptop, name: str, **keys: Any) -> str:
    (laptop.shared / f"{name}.yaml").write_text(json.dumps({"kind": "command", "name": name, **keys}))
    return f"{name}.yaml"


def page(port: int) -> str:
    """What a server at a port of the laptop's loopback answers; empty where nobody does."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/name.txt")
        return connection.getresponse().read().decode()
    connection.close()
    return ""


def test_a_pair_of_web_servers_is_ready_brought_here_and_stopped(laptop: Laptop) -> None:
    for host in laptop.lab.hosts:
        host.run(["mkdir", "-p", "/tmp/pages"])
        host.write("/tmp/pages/name.txt", host.name)
    serve = ["python3", "-m", "http.server", str(PORT), "--directory", "/tmp/pages", "--bind"]
    keys = {"ports": [PORT], "ready": f"http://127.0.0.1:{PORT}/name.txt", "restart": {"max": 0}}
    sides = {"head": [*serve, "127.0.0.1"], "peer": [*serve, "{peer_addr}"]}
    job = laptop.detach(recipe(laptop, "pages", command=sides, **keys))
    try:

        def ready() -> bool:
            state = laptop.state(laptop.head, job)
            assert state is not None and not state.ended, (state, laptop.read(laptop.head, job, "rank0.log"))
            return state.state == "ready"

        laptop.until(ready, 120, "the servers")
        url = f"http://192.168.100.11:{PORT}/name.txt"
        ask = f"import urllib.request as r; print(r.urlopen('{url}').read().decode())"
        assert laptop.head.run(["python3", "-c", ask]).stdout == "spark-b\n"  # over the link, where {peer_addr} is
        with laptop.started("tunnel", job, "--json") as process:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["ports"][str(PORT)]
            assert url == f"http://127.0.0.1:{PORT}/"
            assert page(PORT) == "spark-a"
            laptop.head.sshd(False)
            assert page(PORT) == ""  # nothing hangs while there is no way
            laptop.head.sshd(True)
            laptop.until(lambda: page(PORT) == "spark-a", 60, "the tunnel to find its way again")
    finally:
        stopped = laptop("stop", job)
    assert stopped.returncode == 0, stopped.stderr
    laptop.until(lambda: not laptop.remains(), 30, "the end of both agents")
    left = [process.argv for host in laptop.lab.hosts for process in host.processes() if "http.server" in process.argv]
    assert left == []


def test_a_script_under_torchrun_joins_over_the_link(laptop: Laptop) -> None:
    script = laptop.shared / "reduces.py"
    script.write_text(REDUCES)
    script.chmod(0o644)
    place = ["--nnodes", "2", "--node-rank", "{node_rank}", "--nproc-per-node", "1", "--master-addr", "{head_addr}"]
    words = ["torchrun", *place, "--master-port", "29517", str(script)]
    done = laptop("run", recipe(laptop, "reduces", command=words), seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        assert f"rank {rank} | the sum is 3.0 of 2 met at 192.168.100.10" in done.stdout
    laptop.until(lambda: not laptop.remains(), 30, "the end of both agents")
