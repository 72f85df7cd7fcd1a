"""The file that `up` writes is one that netplan takes, in the host's own renderer, and fights with no other."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster import facts, link, netplan
from cluster.errors import RefusedError
from cluster.inventory import Link
from tests.cluster.fixtures import PORTS, Profile, Spark

TWINS = PORTS[0]
FIRST, SECOND = TWINS


def text(renderer: netplan.Renderer = "NetworkManager", rank: int = 0) -> str:
    plan = link.plan(Spark().facts(), Spark("spark-b", 2).facts(), Link())
    return netplan.render(plan.ends(rank), renderer=renderer, mtu=9000)


def ethernet(name: str, body: str = "{dhcp4: true}") -> str:
    return f"network:\n  version: 2\n  ethernets:\n    {name}: {body}\n"


@pytest.fixture
def generate(tmp_path: Path):
    """Has the real netplan read files; returns what it generates, as path: text."""
    program = shutil.which("netplan", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert program, "these tests need netplan.io"

    def run(**files: str) -> dict[str, str]:
        folder = tmp_path / "etc/netplan"
        folder.mkdir(parents=True)
        for name, body in files.items():
            (folder / f"{name}.yaml").write_text(body)
            (folder / f"{name}.yaml").chmod(0o600)
        done = subprocess.run(
            [program, "generate", "--root-dir", str(tmp_path)], capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
        made = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        return {str(path.relative_to(tmp_path / "run")): path.read_text() for path in made}

    return run


def test_networkd_gets_what_was_asked_for(generate) -> None:
    made = generate(**{"40-cx7": text("networkd")})
    unit = made[f"systemd/network/10-netplan-{FIRST}.network"]
    for line in ("Address=192.168.100.10/24", "MTUBytes=9000", "LinkLocalAddressing=no", "RequiredForOnline=no"):
        assert line in unit.splitlines()
    assert "DHCP" not in unit
    assert not any("NetworkManager/system-connections" in path for path in made)


def test_networkmanager_gets_what_was_asked_for(generate) -> None:
    made = generate(**{"40-cx7": text("NetworkManager", rank=1)})
    profile = made[f"NetworkManager/system-connections/netplan-{SECOND}.nmconnection"]
    for line in ("address1=192.168.101.11/24", "method=manual", "mtu=9000", f"interface-name={SECOND}"):
        assert line in profile.splitlines()
    assert not any(path.endswith(".network") for path in made)


@pytest.mark.parametrize(("ours", "theirs"), [("networkd", "NetworkManager"), ("NetworkManager", "networkd")])
def test_no_other_interface_changes_hands(generate, ours: netplan.Renderer, theirs: str) -> None:
    other = f"network:\n  version: 2\n  renderer: {theirs}\n  ethernets:\n    enP7s7: {{dhcp4: true}}\n"
    made = generate(**{"01-other": other, "40-cx7": text(ours)})
    managed = "NetworkManager/system-connections/netplan-enP7s7.nmconnection" in made
    assert managed == (theirs == "NetworkManager")


def test_the_file_has_nvidias_form_and_is_the_same_each_time() -> None:
    assert text() == text()
    data = yaml.safe_load(text())["network"]
    assert data["version"] == 2
    assert list(data["ethernets"]) == [FIRST, SECOND]
    assert data["ethernets"][SECOND] == {
        "renderer": "NetworkManager",
        "dhcp4": False,
        "dhcp6": False,
        "link-local": [],
        "mtu": 9000,
        "optional": True,
        "addresses": ["192.168.101.10/24"],
    }


def test_a_diff_shows_a_new_file_a_changed_one_and_one_that_goes() -> None:
    new = netplan.diff(None, "a\nb\n")
    assert new.startswith(f"--- /dev/null\n+++ {netplan.PATH}\n")
    assert "+a\n+b\n" in new
    assert "-b\n+c\n" in netplan.diff("a\nb\n", "a\nc\n")
    assert "-a\n" in netplan.diff("a", None)
    assert netplan.diff("a\n", "a\n") == ""


# Who has the interfaces.


def test_the_renderer_is_who_has_the_interfaces() -> None:
    assert netplan.renderer(Spark().facts(), TWINS) == "NetworkManager"
    box = Spark(manager="networkd").configured((FIRST, "10.0.0.1/24"), (SECOND, "10.0.1.1/24"))
    assert netplan.renderer(box.facts(), TWINS) == "networkd"


def test_for_interfaces_that_nobody_has_netplans_own_word_counts_then_what_runs() -> None:
    box = Spark(manager="networkd")
    assert netplan.renderer(box.facts(), TWINS) == "networkd"
    box.netplan = {
        "/etc/netplan/00-installer.yaml": "network: {version: 2, renderer: networkd}\n",
        "/etc/netplan/01-all.yaml": "network: {version: 2, renderer: NetworkManager}\n",
    }
    assert netplan.renderer(box.facts(), TWINS) == "NetworkManager"  # the last one
    box.netplan["/etc/netplan/02-hidden.yaml"] = None  # and that may be this one
    assert netplan.renderer(box.facts(), TWINS) == "networkd"


def test_a_renderer_that_cannot_be_told_is_refused() -> None:
    box = Spark(changes={"networkmanager": None})
    with pytest.raises(RefusedError, match="spark-a: whether NetworkManager or networkd"):
        netplan.renderer(box.facts(), TWINS)
    with pytest.raises(RefusedError, match="it hangs"):
        netplan.renderer(Spark(unknown={"networkmanager": "it hangs"}).facts(), TWINS)


# Who else claims them.


@pytest.mark.parametrize(
    "body",
    [
        ethernet(FIRST),
        ethernet("ports", '{match: {name: "enp1s0f*"}, dhcp4: true}'),
        ethernet("port", "{match: {macaddress: '48:21:0B:03:01:00'}}"),
        ethernet("cx7", "{match: {driver: [mlx4*, mlx5*]}}"),
        ethernet(FIRST, "{match: {}}"),
        f'network:\n  ethernets:\n    {FIRST}: {{auth: "left out"\n',  # no longer YAML without its secret
    ],
)
def test_another_file_that_claims_an_interface_is_refused_with_both_names(body: str) -> None:
    box = Spark(netplan={"/etc/netplan/50-cloud-init.yaml": body, netplan.PATH: ethernet(FIRST)})
    with pytest.raises(RefusedError) as error:
        netplan.refuse_rivals(box.facts(), TWINS)
    assert "/etc/netplan/50-cloud-init.yaml" in error.value.message
    assert netplan.PATH in error.value.message
    assert FIRST in error.value.message


@pytest.mark.parametrize(
    "body",
    [
        ethernet("enP7s7"),
        ethernet(f"{FIRST}0"),
        ethernet("other", '{match: {name: "enp9*"}}'),
        ethernet("other", "{match: {name: 'en*', macaddress: '00:00:00:00:00:01'}}"),
        f"# {FIRST}\nnetwork: {{version: 2, renderer: NetworkManager}}\n",
        "",
        "network: 7\n",
        f"network:\n  wifis:\n    {FIRST}: {{dhcp4: true}}\n",
    ],
)
def test_files_about_something_else_are_no_rivals(body: str) -> None:
    box = Spark(netplan={"/etc/netplan/01-a.yaml": body, netplan.PATH: ethernet(FIRST)})
    assert netplan.rivals(box.facts(), TWINS) == ()


def test_profiles_of_networkmanager_itself_are_rivals() -> None:
    keyfile = "/etc/NetworkManager/system-connections/my link.nmconnection"
    box = Spark(profiles=(Profile(SECOND, ("10.0.0.1/24",), keyfile, name="my link"),))
    (rival,) = netplan.rivals(box.facts(), TWINS)
    assert (rival.interface, rival.source) == (SECOND, keyfile)
    assert rival.fix == "sudo nmcli connection delete 'my link'"


def test_a_profile_that_networkmanager_keeps_through_netplan_is_a_rival_once() -> None:
    uuid = "10ba1c6b-5a3c-4f5f-8a58-6a4a3f3a2b11"
    path = f"/etc/netplan/90-NM-{uuid}.yaml"
    source = f"/run/NetworkManager/system-connections/netplan-NM-{uuid}-Wired.nmconnection"
    box = Spark(profiles=(Profile(FIRST, (), source),), netplan={path: None})
    (rival,) = netplan.rivals(box.facts(), TWINS)
    assert (rival.source, rival.fix) == (path, f"sudo nmcli connection delete {uuid}")
    read = facts.with_netplan(box.facts(), {path: ethernet(f"NM-{uuid}", f"{{match: {{name: {FIRST}}}}}")})
    assert netplan.rivals(read, TWINS) == (rival,)


def test_only_a_networkd_file_that_goes_before_netplans_is_a_rival() -> None:
    box = Spark(manager="networkd", profiles=(Profile(FIRST, (), "/etc/systemd/network/05-cx7.network"),))
    assert [rival.source for rival in netplan.rivals(box.facts(), TWINS)] == ["/etc/systemd/network/05-cx7.network"]
    box.profiles = (Profile(FIRST, (), "/etc/systemd/network/90-connectx.network"),)
    assert netplan.rivals(box.facts(), TWINS) == ()


def test_the_profiles_that_networkmanager_makes_up_and_our_own_are_no_rivals() -> None:
    box = Spark().configured((FIRST, "192.168.100.10/24"), (SECOND, "192.168.101.10/24"))
    assert netplan.rivals(box.facts(), TWINS) == ()


def test_files_that_only_root_may_read_are_named() -> None:
    box = Spark(netplan={"/etc/netplan/01-a.yaml": None, "/lib/netplan/00-b.yaml": "network: {}\n"})
    assert netplan.unreadable(box.facts()) == ("/etc/netplan/01-a.yaml",)
