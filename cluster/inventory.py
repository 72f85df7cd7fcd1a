"""inventory.yaml: the two nodes of a pair, the link between them, and the environment that every rank gets."""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from cluster import yamlfile
from cluster.errors import WrongInputError
from cluster.yamlfile import WrongKeyError, says, shown

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def is_secret(name: str) -> bool:
    """Whether the value of an environment variable of this name must never be shown or written down."""
    return yamlfile.SECRET_NAME.search(name) is not None


def _safe_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", value):
        raise ValueError(
            f"must be 1 to 63 letters, digits, '-', '_' or '.', and start with a letter or digit, not {shown(value)}"
        )
    return value


def _one_line(value: str) -> str:
    if not value.strip() or _CONTROL.search(value):
        raise ValueError(f"must be one line of text, not {shown(value)}")
    return value


def _argument(value: str) -> str:
    if _one_line(value).startswith("-"):
        raise ValueError(f"must not start with '-', not {shown(value)}")
    return value


def _host(value: str) -> str:
    # A whitelist: what ssh and a shell would read as an option, a proxy or a command cannot be spelled.
    if not re.fullmatch(r"[A-Za-z0-9:][A-Za-z0-9._:%-]{0,252}", value):
        raise ValueError(f"must be a host name or an address, not {shown(value)}")
    return value


def _user(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._@+-]{0,63}", value):
        raise ValueError(f"must be a user's name, not {shown(value)}")
    return value


def _environment(value: Any) -> Any:
    if not isinstance(value, dict):
        return value  # the mapping's own validator says so
    for name, text in value.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise WrongKeyError(name, "must be letters, digits and '_', to be an environment variable's name")
        if text is None:
            raise WrongKeyError(name, 'is empty; write "" for an empty value')
        # The value itself is never shown: it may be a secret.
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise WrongKeyError(name, "must be text or a number; put it in quotes")
        if _CONTROL.search(str(text)):
            raise WrongKeyError(name, "must be one line of text, without control characters")
    return {name: str(text) for name, text in value.items()}


def _subnet(value: Any) -> IPv4Network:
    if isinstance(value, IPv4Network):
        return value
    try:
        network = IPv4Network(value if isinstance(value, str) else "", strict=False)
    except ValueError:
        raise ValueError(f"must be an IPv4 network such as 192.168.100.0/24, not {shown(value)}") from None
    if str(network.network_address) != value.partition("/")[0]:
        raise ValueError(f"must be a network, not the address {shown(value)}; did you mean {network}?")
    if not 8 <= network.prefixlen <= 30:
        raise ValueError(f"must leave room for two addresses (/8 to /30), not {shown(value)}")
    if network.is_loopback or network.is_multicast or network.is_unspecified:
        raise ValueError(f"must be a network that a cable can carry, not {shown(value)}")
    return network


def _two(of_what: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) != 2:
            found = len(value) if isinstance(value, list | tuple) else shown(value)
            raise ValueError(f"must list {of_what}, not {found}")
        return tuple(value)  # what follows a Python validator is no longer JSON, and strict

    return BeforeValidator(check)


# Types that the recipe shares.
Name = Annotated[str, AfterValidator(_safe_name)]
OneLine = Annotated[str, AfterValidator(_one_line)]
Argument = Annotated[str, AfterValidator(_argument)]
PortNumber = Annotated[int, Field(ge=1, le=65535)]
Environment = Annotated[
    dict[str, str],
    BeforeValidator(_environment),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": ["string", "number"]}}),
]

_Subnet = Annotated[
    IPv4Network,
    PlainValidator(_subnet),
    PlainSerializer(str),
    WithJsonSchema({"type": "string"}),
]


class Node(BaseModel):
    """One box: how to reach it."""

    model_config = yamlfile.STRICT

    name: Name = Field(description="What the node is called in commands, logs and messages.")
    transport: Literal["ssh", "local"] = Field(
        default="ssh", description="ssh, or local for the machine on which sparkctl runs."
    )
    host: Annotated[str, AfterValidator(_host)] | None = Field(
        default=None, description="The node's address or host name on the management network."
    )
    user: Annotated[str, AfterValidator(_user)] | None = Field(default=None, description="The user to log in as.")
    port: PortNumber = Field(default=22, description="The port of the node's sshd.")
    identity_file: Argument | None = Field(
        default=None, description="The private key to log in with; relative to the inventory's folder."
    )
    python: Argument | None = Field(default=None, description="The Python interpreter to use on the node.")

    @property
    def is_local(self) -> bool:
        """Whether the node is the machine on which sparkctl runs."""
        return self.transport == "local"

    @model_validator(mode="after")
    def _fits_its_transport(self) -> Self:
        if self.transport == "ssh" and self.host is None:
            raise WrongKeyError("host", "is missing, and transport: ssh needs it")
        if self.transport == "local":
            for key in ("host", "user", "identity_file"):
                if getattr(self, key) is not None:
                    raise WrongKeyError(key, "makes no sense with transport: local")
            if self.port != 22:
                raise WrongKeyError("port", "makes no sense with transport: local")
        return self


class Link(BaseModel):
    """The cable between the boxes: two twin interfaces, each with a subnet of its own."""

    model_config = yamlfile.STRICT

    # 1280 is the least that IPv6 allows, 9978 the most that a ConnectX-7 takes.
    mtu: int = Field(default=9000, ge=1280, le=9978, description="The interfaces' MTU in bytes.")
    subnets: Annotated[tuple[_Subnet, _Subnet], _two("two networks, one for each of the twin interfaces")] = Field(
        default=(IPv4Network("192.168.100.0/24"), IPv4Network("192.168.101.0/24")),
        description="The IPv4 networks of the twin interfaces; they must differ, or the routing is ambiguous.",
    )
    port: Annotated[Literal["auto"] | Annotated[int, Field(ge=0, le=1)], says("auto, 0 or 1")] = Field(
        default="auto", description="Which of the two sockets the cable is in; auto takes the one that has a carrier."
    )
    min_gbps: float = Field(
        default=160.0,
        gt=0,
        le=400,
        description="The measured bandwidth, in Gbit/s, below which the link counts as broken.",
    )

    @model_validator(mode="after")
    def _twins_differ(self) -> Self:
        first, second = self.subnets
        if first.overlaps(second):
            raise WrongKeyError("subnets", f"must not overlap, as {first} and {second} do")
        return self


class Inventory(BaseModel):
    """A pair: its two nodes, their link, and what is added to every rank's environment."""

    model_config = yamlfile.STRICT

    nodes: Annotated[tuple[Node, Node], _two("two nodes, the head first")] = Field(
        description="The two nodes of the pair, the head (rank 0) first."
    )
    link: Link = Field(default_factory=Link, description="The cable between the two.")
    env: Environment = Field(
        default_factory=dict, repr=False, description="Environment of every rank; wins over sparkctl's own."
    )

    @property
    def head(self) -> Node:
        """The node of rank 0."""
        return self.nodes[0]

    @property
    def peer(self) -> Node:
        """The node of rank 1."""
        return self.nodes[1]

    @property
    def embedded(self) -> bool:
        """Whether both nodes are this machine: a pair without boxes, to try things on."""
        return self.head.is_local and self.peer.is_local

    @model_validator(mode="after")
    def _nodes_differ(self) -> Self:
        head, peer = self.nodes
        if head.name.casefold() == peer.name.casefold():  # folders are named after nodes, and macOS folds case
            raise WrongKeyError("nodes", f"must have two names, not {head.name} twice")
        if head.host is not None and (head.host.lower(), head.port) == ((peer.host or "").lower(), peer.port):
            raise WrongKeyError("nodes", f"must be two machines, not {head.host} twice")
        return self


EMBEDDED = Inventory(nodes=(Node(name="left", transport="local"), Node(name="right", transport="local")))

_VARIABLE = "SPARKCTL_INVENTORY"


def find(explicit: Path | None) -> Path:
    """The inventory file that counts: `explicit` (-i), else $SPARKCTL_INVENTORY, ./inventory.yaml, ~/.config/sparkctl/.

    Raises:
        WrongInputError: the file that was named is not there, or none was named and none found.
    """
    found = _found(explicit)
    if found is None:
        places = ", ".join(str(path) for path in _usual_places())
        raise WrongInputError(
            f"no inventory: looked at ${_VARIABLE} (not set), {places}",
            "`sparkctl up --discover` writes one; -i FILE names one",
        )
    return found


def load(explicit: Path | None, *, default_embedded: bool = False) -> Inventory:
    """Read the inventory that `find` finds. With `default_embedded`, none anywhere means the embedded pair.

    Raises:
        WrongInputError: no inventory, or a wrong one: `FILE:LINE: key: what is wrong`.
    """
    if default_embedded and _found(explicit) is None:
        return EMBEDDED
    path = find(explicit)
    inventory = yamlfile.parse(Inventory, yamlfile.read(path))
    return inventory.model_copy(update={"nodes": tuple(_with_key_beside(node, path) for node in inventory.nodes)})


def _found(explicit: Path | None) -> Path | None:
    named = os.environ.get(_VARIABLE)
    if explicit is not None or named:
        path = explicit or Path(named or "").expanduser()
        if not path.exists():
            source = "-i" if explicit is not None else f"${_VARIABLE}"
            raise WrongInputError(f"{path}: no such inventory file", f"{source} names it")
        return path
    return next((path for path in _usual_places() if path.expanduser().exists()), None)


def _usual_places() -> tuple[Path, Path]:
    return Path("inventory.yaml"), Path("~/.config/sparkctl/inventory.yaml").expanduser()


def _with_key_beside(node: Node, inventory: Path) -> Node:
    if node.identity_file is None:
        return node
    key = inventory.absolute().parent / Path(node.identity_file).expanduser()
    return node.model_copy(update={"identity_file": str(key)})
