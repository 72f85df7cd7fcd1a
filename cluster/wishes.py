"""What `up` wants of each node, as changes. Pure: facts and a link plan in, changes out.

Outside $SPARKCTL_HOME that is: the netplan file and the MTU of the link, two lines of /etc/hosts, a line of the user's
authorized_keys, and the agent's unit in the user's systemd manager with lingering. Inside: the code, the node's key, the ranks'
Python environment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from cluster import netplan
from cluster.changes import Change, CommandChange, FileChange, LinesChange, MakeChange, TreeChange
from cluster.code import Code
from cluster.errors import RefusedError
from cluster.facts import Facts, Unknown, User, known
from cluster.inventory import Node
from cluster.link import End, LinkPlan

T = TypeVar("T")

# Relative to $SPARKCTL_HOME. The key opens the other node, and only from this node's addresses on the link.
KEY = "ssh/id_ed25519"
KNOWN_HOSTS = "ssh/known_hosts"
VENV = "venv"
UNIT = "~/.config/systemd/user/sparkctl-job@.service"

# What an agent and its ranks cannot do without, and what else `up` installs by constraints.txt where it makes the environment.
NEEDED = ("torch", "transformers", "safetensors", "peft", "click", "pydantic", "pyyaml")
INSTALLED = (
    *NEEDED,
    "rich",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "tensorboard",
    "fastapi",
    "uvicorn",
    "numpy",
    "xxhash",
)
_INSTALL_SECONDS = 3600.0
_GIB = 1 << 30
_ENVIRONMENT_BYTES = 16 * _GIB  # torch with CUDA and all that it brings, twice while it is unpacked
_CODE_BYTES = 16 << 20  # code, journal, backups

_USUAL_MTU = 1500
_UNSAID = "(the key that {node} makes)"


@dataclass(frozen=True)
class Site:
    """A node as `up` found it.

    Args:
        host_keys: the public keys of its sshd, as lines `TYPE BASE64`.
        public_key: the node's own key for the other node, likewise; None: it has none yet.
    """

    node: Node
    facts: Facts
    host_keys: tuple[str, ...]
    public_key: str | None

    @property
    def home(self) -> str:
        """Its $SPARKCTL_HOME."""
        return _of(self.facts, self.facts.sparkctl).path

    @property
    def user(self) -> User:
        """Whom we log in as."""
        return _of(self.facts, self.facts.user)

    @property
    def python(self) -> str:
        """The interpreter of its ranks."""
        packages = known(self.facts.packages, None)
        if self.node.python is None:
            return f"{self.home}/{VENV}/bin/python"
        return packages.python if packages else self.node.python


Sites = tuple[Site, Site]


def code_path(site: Site, code: Code) -> str:
    """Where the code lies on the node."""
    return f"{site.home}/code/{code.hash}"


def changes(sites: Sites, plan: LinkPlan, code: Code, *, wheelhouse: str | None) -> tuple[tuple[Change, ...], ...]:
    """What each node is to get, by rank, in the order in which it is made: the network last, since it is what can go wrong.

    Raises:
        RefusedError: another configuration claims the interfaces, the environment named in the inventory is not enough, or
            the disk is full.
    """
    return tuple(_changes_of(sites, rank, plan, code, wheelhouse) for rank in (0, 1))


def _changes_of(sites: Sites, rank: int, plan: LinkPlan, code: Code, wheelhouse: str | None) -> tuple[Change, ...]:
    site, other = sites[rank], sites[1 - rank]
    environment = _environment(site, code, wheelhouse)
    _refuse_full_disk(site, _ENVIRONMENT_BYTES if environment else _CODE_BYTES)
    return (
        *_code(site, code),
        *_key(site),
        _known_hosts(other, plan.ends(1 - rank)),
        _authorized(other, plan.ends(1 - rank)),
        *environment,
        *_agent(site, code),
        _names(sites, plan),
        *_link(site, plan.ends(rank), plan),
    )


def _code(site: Site, code: Code) -> tuple[Change, ...]:
    there = code.hash in _of(site.facts, site.facts.sparkctl).code
    return (TreeChange(f"$SPARKCTL_HOME/code/{code.hash}", b"" if there else code.archive),)


def _key(site: Site) -> tuple[Change, ...]:
    path = f"$SPARKCTL_HOME/{KEY}"
    argv = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"sparkctl {site.node.name}", "-f", path)
    return (MakeChange("make this node's key for the other one", (path, f"{path}.pub"), argv),)


def is_key(change: Change) -> bool:
    """Whether it makes a node's key, which the other node's changes depend on."""
    return isinstance(change, MakeChange) and change.paths[0] == f"$SPARKCTL_HOME/{KEY}"


def _known_hosts(other: Site, ends: Sequence[End]) -> Change:
    addresses = ",".join(str(end.address.ip) for end in ends)
    text = "".join(f"{addresses} {key}\n" for key in other.host_keys)
    return FileChange(f"$SPARKCTL_HOME/{KNOWN_HOSTS}", text.encode(), mode=0o600)


def _authorized(other: Site, ends: Sequence[End]) -> Change:
    addresses = ",".join(str(end.address.ip) for end in ends)
    key = other.public_key or _UNSAID.format(node=other.node.name)
    line = f'from="{addresses}",restrict {key} sparkctl {other.node.name}'
    return LinesChange("~/.ssh/authorized_keys", (line,), label=f"key of {other.node.name}")


def _environment(site: Site, code: Code, wheelhouse: str | None) -> tuple[Change, ...]:
    packages = known(site.facts.packages, None)
    lacking = [name for name in NEEDED if packages is None or packages.version_of(name) is None]
    if not lacking:
        return ()
    if site.node.python is not None:
        seen = f"lacks {', '.join(lacking)}" if packages else "is not there"
        raise RefusedError(
            f"{site.node.name}: {site.node.python} {seen}, and the ranks need it",
            "install that there, or take `python` out of the inventory: then `sparkctl up` makes an environment",
        )
    # Without `--relocatable` and the like: the environment is made where it stays.
    uv = "uv" if site.facts.has_tool("uv") is True else ""
    folder, shipped = f"$SPARKCTL_HOME/{VENV}", f"$SPARKCTL_HOME/code/{code.hash}"
    make = ("python3", "-I", f"{shipped}/cluster/venv.py", folder, f"{shipped}/constraints.txt", uv, wheelhouse or "")
    source = wheelhouse or "the package index"
    title = f"install the ranks' Python environment from {source} ({'uv' if uv else 'pip'})"
    return (MakeChange(title, (folder,), (*make, *INSTALLED), timeout=_INSTALL_SECONDS),)


def _agent(site: Site, code: Code) -> tuple[Change, ...]:
    name = site.user.name or str(site.user.uid)
    linger = CommandChange(
        f"let {name}'s services run without a login",
        do=("loginctl", "enable-linger", name),
        undo=("loginctl", "disable-linger", name),
        check=("loginctl", "show-user", "--property=Linger", "--value", name),
        done="yes",
        root=True,
    )
    text = unit(python=site.python, code=code_path(site, code), home=site.home)
    return (FileChange(UNIT, text.encode(), reload=(("systemctl", "--user", "daemon-reload"),)), linger)


def unit(*, python: str, code: str, home: str) -> str:
    """The agent's unit; its instance is the job's id. All three are absolute paths on the node.

    An agent takes its ranks with it: when it has ended, so does the rest of the control group, those included that ignore SIGTERM.
    The signal itself goes to the agent alone, which first tells the other node. An agent that was killed comes back; one that has
    ended by itself has said why.
    """
    variables = " ".join(f'"{_escaped(one)}"' for one in (f"PYTHONPATH={code}", f"SPARKCTL_HOME={home}"))
    # Unlike Environment=, a command line expands variables too.
    program, jobs = (_escaped(word).replace("$", "$$") for word in (python, f"{home}/jobs"))
    return (
        "# Written by `sparkctl up`; `sparkctl down` removes it.\n"
        "[Unit]\n"
        "Description=sparkctl job %i\n"
        "\n"
        "[Service]\n"
        f"Environment={variables}\n"
        "Environment=SPARKCTL_UNIT=%n\n"
        f'ExecStart="{program}" -P -m sparkctl agent "{jobs}/%i"\n'
        f"StandardOutput=append:{_percents(home)}/jobs/%i/agent.log\n"
        f"StandardError=append:{_percents(home)}/jobs/%i/agent.log\n"
        "UMask=0077\n"
        "KillMode=mixed\n"
        "TimeoutStopSec=15\n"
        "Restart=on-abnormal\n"
        "RestartSec=2\n"
        "\n"
        "[Install]\n"
        "WantedBy=default.target\n"
    )


def _percents(text: str) -> str:
    """For a path that takes the rest of its line."""
    return text.replace("%", "%%")


def _escaped(text: str) -> str:
    """For between double quotes: as systemd.syntax(7) and the specifiers of systemd.unit(5) want it."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")


def _names(sites: Sites, plan: LinkPlan) -> Change:
    """For people: ranks are given addresses."""
    lines = tuple(
        f"{end.address.ip} {site.node.name}-link" for site, end in zip(sites, plan.rails[0].ends, strict=True)
    )
    return LinesChange("/etc/hosts", lines, label="the link", mode=0o644, root=True)


def _link(site: Site, ends: Sequence[End], plan: LinkPlan) -> tuple[Change, ...]:
    if plan.adopted:
        return ()
    interfaces = [end.interface for end in ends]
    netplan.refuse_rivals(site.facts, interfaces)
    mtu = plan.rails[0].mtu
    text = netplan.render(ends, renderer=netplan.renderer(site.facts, interfaces), mtu=mtu)
    # netplan sets the MTU too, but nothing takes it back when the file has gone.
    settings = [_mtu(site.facts, name, mtu) for name in interfaces]
    apply, trial = (("netplan", "apply"),), ("netplan", "generate", "--root-dir", "{root}")
    file = FileChange(netplan.PATH, text.encode(), mode=netplan.MODE, root=True, reload=apply, trial=trial)
    return (*settings, file)


def _mtu(facts: Facts, interface: str, mtu: int) -> Change:
    nic = facts.nic(interface)
    now = (nic and nic.mtu) or _USUAL_MTU
    set_to = ("ip", "link", "set", "dev", interface, "mtu")
    return CommandChange(
        f"set the MTU of {interface} to {mtu}",
        do=(*set_to, str(mtu)),
        undo=(*set_to, str(now)),
        check=("cat", f"/sys/class/net/{interface}/mtu"),
        done=str(mtu),
        root=True,
    )


def _refuse_full_disk(site: Site, needed: int) -> None:
    for disk in known(site.facts.disks, ()):
        if disk.path == site.home and isinstance(disk.free, int) and disk.free < needed:
            raise RefusedError(
                f"{site.node.name}: {disk.free >> 20} MiB free for {site.home}, and this takes {needed >> 20} MiB",
                "free some space there, then again",
            )


def public_key(text: str) -> str | None:
    """`TYPE BASE64` of the first line of a public key file, without its comment; None: it holds no key."""
    found = re.match(r"((?:ssh|ecdsa|sk)-[a-z0-9@.-]+) ([A-Za-z0-9+/]+={0,2})(?:\s|$)", text)
    return f"{found[1]} {found[2]}" if found else None


def _of(facts: Facts, fact: T | Unknown) -> T:
    if isinstance(fact, Unknown):
        raise RefusedError(
            f"{facts.node}: cannot be looked at: {fact.reason}", "log in there and see whether that works"
        )
    return fact
