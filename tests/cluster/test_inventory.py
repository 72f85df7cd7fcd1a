"""inventory.yaml: two nodes that can be reached safely, or one line that says why not."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

import pytest

from cluster import inventory
from cluster.errors import WrongInputError
from cluster.inventory import Inventory, is_secret

PAIR = "nodes:\n  - {name: a, host: 10.0.0.1, user: u}\n  - {name: b, host: 10.0.0.2, user: u}\n"
EMBEDDED = "nodes: [{name: left, transport: local}, {name: right, transport: local}]\n"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SPARKCTL_INVENTORY", raising=False)
    monkeypatch.chdir(tmp_path)


def parsed(text: str) -> Inventory:
    Path("inventory.yaml").write_text(text)
    return inventory.load(None)


def test_a_full_inventory_is_read() -> None:
    pair = parsed(
        "nodes:\n  - {name: spark-a, host: fe80::1%eth0, user: alice, port: 2222, identity_file: keys/id, python: /opt/py}\n"
        "  - {name: spark-b, transport: local}\n"
        "link: {mtu: 1500, subnets: [10.1.0.0/30, 10.2.0.0/16], port: 1, min_gbps: 100}\n"
        "env: {NCCL_DEBUG: INFO, RATIO: 0.5, COUNT: 3, KEEP: 007}\n"
    )
    assert (pair.head.name, pair.peer.name, pair.embedded) == ("spark-a", "spark-b", False)
    assert (pair.head.host, pair.head.port, pair.head.python) == ("fe80::1%eth0", 2222, "/opt/py")
    assert (pair.head.is_local, pair.peer.is_local) == (False, True)
    assert pair.head.identity_file == str(Path.cwd() / "keys/id")
    assert pair.link.subnets == (IPv4Network("10.1.0.0/30"), IPv4Network("10.2.0.0/16"))
    assert (pair.link.mtu, pair.link.port, pair.link.min_gbps) == (1500, 1, 100)
    assert pair.env == {"NCCL_DEBUG": "INFO", "RATIO": "0.5", "COUNT": "3", "KEEP": "007"}


def test_the_rest_has_defaults() -> None:
    pair = parsed(PAIR)
    assert (pair.head.port, pair.head.identity_file, pair.head.transport) == (22, None, "ssh")
    assert pair.link.subnets == (IPv4Network("192.168.100.0/24"), IPv4Network("192.168.101.0/24"))
    assert (pair.link.mtu, pair.link.port, pair.link.min_gbps, pair.env) == (9000, "auto", 160, {})


def test_the_shipped_inventory_is_the_embedded_pair() -> None:
    shipped = inventory.load(Path(__file__).parents[2] / "inventory.yaml")
    assert shipped == inventory.EMBEDDED
    assert shipped.embedded


def test_a_key_in_the_home_folder_is_found() -> None:
    pair = parsed(PAIR.replace("user: u}", "user: u, identity_file: ~/.ssh/id}", 1))
    assert pair.head.identity_file == str(Path.home() / ".ssh/id")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("link: {}\n", "1: nodes: is missing"),
        ("nodes: [{name: a, host: x}]\n", "1: nodes: must list two nodes, the head first, not 1"),
        (PAIR + "  - {name: c, host: z}\n", "1: nodes: must list two nodes, the head first, not 3"),
        ("nodes: a\n", "1: nodes: must list two nodes, the head first, not 'a'"),
        (PAIR.replace("name: b", "name: A"), "1: nodes: must have two names, not a twice"),
        (PAIR.replace("10.0.0.2", "10.0.0.1"), "1: nodes: must be two machines, not 10.0.0.1 twice"),
        (PAIR.replace("host: 10.0.0.1, ", ""), "2: nodes.0.host: is missing, and transport: ssh needs it"),
        (PAIR.replace("user: u}", "transport: local}", 1), "2: nodes.0.host: makes no sense with transport: local"),
        (EMBEDDED.replace("local}", "local, user: u}", 1), "1: nodes.0.user: makes no sense with transport: local"),
        (EMBEDDED.replace("local}", "local, port: 2}", 1), "1: nodes.0.port: makes no sense with transport: local"),
        (PAIR.replace("user: u}", "transport: shh}", 1),
         "2: nodes.0.transport: must be ssh or local, not 'shh'; did you mean ssh?"),
        (PAIR.replace("user", "usr", 1), "2: nodes.0.usr: unknown key; did you mean user?"),
        (PAIR.replace("user: u}", "user: u, port: 0}", 1), "2: nodes.0.port: must be at least 1, not 0"),
        (PAIR.replace("user: u}", "user: u, port: 70000}", 1), "2: nodes.0.port: must be at most 65535, not 70000"),
        (PAIR.replace("user: u}", "user: u, identity_file: -x}", 1),
         "2: nodes.0.identity_file: must not start with '-', not '-x'"),
        (PAIR + "link: {port: 2}\n", "4: link.port: must be auto, 0 or 1, not 2"),
        (PAIR + "link: {port: true}\n", "4: link.port: must be auto, 0 or 1, not true"),
        (PAIR + "link: {mtu: 9}\n", "4: link.mtu: must be at least 1280, not 9"),
        (PAIR + "link: {min_gbps: 0}\n", "4: link.min_gbps: must be above 0, not 0"),
        (PAIR + "link: {subnets: [10.0.0.0/24]}\n",
         "4: link.subnets: must list two networks, one for each of the twin interfaces, not 1"),
        (PAIR + "link: {subnets: [10.0.0.0/24, 10.0.0.0/8]}\n",
         "4: link.subnets: must not overlap, as 10.0.0.0/24 and 10.0.0.0/8 do"),
        (PAIR + "link:\n  subnets:\n    - 10.0.0.0/24\n    - 10.1.0.5/24\n",
         "7: link.subnets.1: must be a network, not the address '10.1.0.5/24'; did you mean 10.1.0.0/24?"),
        (PAIR + "link: {subnets: [10.0.0.0/31, 10.1.0.0/24]}\n",
         "4: link.subnets.0: must leave room for two addresses (/8 to /30), not '10.0.0.0/31'"),
        (PAIR + "link: {subnets: [fe80::/64, 10.1.0.0/24]}\n",
         "4: link.subnets.0: must be an IPv4 network such as 192.168.100.0/24, not 'fe80::/64'"),
        (PAIR + "link: {subnets: [127.0.0.0/8, 10.1.0.0/24]}\n",
         "4: link.subnets.0: must be a network that a cable can carry, not '127.0.0.0/8'"),
        (PAIR + "env: {A-B: x}\n", "4: env.A-B: must be letters, digits and '_', to be an environment variable's name"),
        (PAIR + "env: {A: true}\n", "4: env.A: must be text or a number; put it in quotes"),
        (PAIR + "env: {A: }\n", '4: env.A: is empty; write "" for an empty value'),
        (PAIR + 'env: {A: "x\\ny"}\n', "4: env.A: must be one line of text, without control characters"),
        (PAIR + "env: 3\n", "4: env: must be a mapping (`key: value` lines), not 3"),
    ],
)  # fmt: skip
def test_a_wrong_inventory_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(WrongInputError) as caught:
        parsed(text)
    assert caught.value.message == f"inventory.yaml:{message}"


HOSTILE = [
    "-oProxyCommand=id",
    "a b",
    "a;id",
    "$(id)",
    "`id`",
    "a\\nb",
    "a|b",
    "a'b",
    "../x",
    "é",
    "x" * 300,
    "",
    "a\\n",
]


@pytest.mark.parametrize("key", ["name", "host", "user"])
@pytest.mark.parametrize("value", HOSTILE)
def test_what_a_shell_or_ssh_would_act_on_cannot_be_named(key: str, value: str) -> None:
    node = {"name": "a", "host": "10.0.0.1", "user": "u", key: value}
    entry = ", ".join(f'{name}: "{text}"' for name, text in node.items()).replace("\\\\n", "\\n")
    with pytest.raises(WrongInputError) as caught:
        parsed(f"nodes:\n  - {{{entry}}}\n  - {{name: other, host: 10.0.0.2}}\n")
    assert caught.value.message.startswith(f"inventory.yaml:2: nodes.0.{key}: must be ")


def test_a_secret_is_in_no_error_and_no_representation() -> None:
    with pytest.raises(WrongInputError) as caught:
        parsed(PAIR + "env: {HF_TOKEN: [hunter2]}\n")
    assert "hunter2" not in caught.value.message + caught.value.fix
    assert "hunter2" not in repr(parsed(PAIR + "env: {HF_TOKEN: hunter2}\n"))


@pytest.mark.parametrize(
    ("name", "secret"), [("HF_TOKEN", True), ("api_key", True), ("DB_PASSWORD", True), ("NCCL_DEBUG", False)]
)
def test_secrets_are_known_by_their_names(name: str, secret: bool) -> None:
    assert is_secret(name) is secret


def test_the_named_inventory_wins_over_the_variable_over_the_current_folder_over_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_home = tmp_path / "home/.config/sparkctl/inventory.yaml"
    at_home.parent.mkdir(parents=True)
    at_home.write_text(PAIR)
    assert inventory.find(None) == at_home
    Path("inventory.yaml").write_text(PAIR)
    assert inventory.find(None) == Path("inventory.yaml")
    variable = tmp_path / "variable.yaml"
    variable.write_text(PAIR)
    monkeypatch.setenv("SPARKCTL_INVENTORY", str(variable))
    assert inventory.find(None) == variable
    assert inventory.find(at_home) == at_home


def test_none_found_says_where_it_looked_unless_the_embedded_pair_will_do(tmp_path: Path) -> None:
    with pytest.raises(WrongInputError) as caught:
        inventory.load(None)
    usual = tmp_path / "home/.config/sparkctl/inventory.yaml"
    assert caught.value.message == f"no inventory: looked at $SPARKCTL_INVENTORY (not set), inventory.yaml, {usual}"
    assert inventory.load(None, default_embedded=True) == inventory.EMBEDDED


def test_a_named_inventory_that_is_not_there_is_an_error_even_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WrongInputError) as caught:
        inventory.load(Path("absent.yaml"), default_embedded=True)
    assert (caught.value.message, caught.value.fix) == ("absent.yaml: no such inventory file", "-i names it")
    monkeypatch.setenv("SPARKCTL_INVENTORY", "gone.yaml")
    with pytest.raises(WrongInputError) as caught:
        inventory.load(None, default_embedded=True)
    assert (caught.value.message, caught.value.fix) == (
        "gone.yaml: no such inventory file",
        "$SPARKCTL_INVENTORY names it",
    )
