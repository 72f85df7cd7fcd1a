"""The small pure parts of `up`: the agent's unit, the steps to an environment, a verdict, a redaction."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from cluster import code, venv
from cluster.doctor.redaction import Redactor
from cluster.finding import Finding, Level
from cluster.measurement import Measurement, Wire
from cluster.pairing import judged
from cluster.wishes import INSTALLED, public_key, unit

WIRE = Wire(("a", "b"), ("192.168.100.10", "192.168.100.11"), ("x", "y"), 9000)
NOTHING = Measurement(0.0, ("spark-a", "spark-b"), (WIRE, WIRE))


def test_the_unit_keeps_what_systemd_would_expand() -> None:
    text = unit(python="/home/a b/100%/py", code='/c"o\\de', home="/home/$USER")
    assert '\nExecStart="/home/a b/100%%/py" -P -m sparkctl agent "/home/$$USER/jobs/%i"\n' in text
    assert '\nEnvironment="PYTHONPATH=/c\\"o\\\\de" "SPARKCTL_HOME=/home/$USER"\n' in text


def test_a_public_key_is_taken_without_its_comment_and_nothing_else_passes() -> None:
    assert public_key("ssh-ed25519 AAAA= me@there\n") == "ssh-ed25519 AAAA="
    assert public_key('command="rm" ssh-ed25519 AAAA') is None
    assert public_key("-----BEGIN OPENSSH PRIVATE KEY-----") is None


def test_code_is_named_by_its_content(tmp_path: Path) -> None:
    own = code.own()
    assert {"constraints.txt", "cluster/code.py", "sparkctl/cli.py", "launch/job.py"} <= {path for path, _ in own.files}
    assert not any("__pycache__" in path for path, _ in own.files)
    other = code.Code((*own.files[:-1], (own.files[-1][0], b"another")))
    assert other.hash != own.hash


def test_what_up_installs_is_what_the_package_says_that_a_rank_needs() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    wanted = {re.split("[<>=\\[]", word)[0].lower() for word in project["optional-dependencies"]["node"]}
    assert wanted <= {name.partition("[")[0] for name in INSTALLED}


@pytest.mark.parametrize("uv", ["", "uv"])
def test_an_environment_comes_from_constraints_and_a_wheelhouse(uv: str) -> None:
    steps = venv.steps(Path("/v"), Path("/c.txt"), uv, "/wheels", ("torch",))
    assert steps[-1][-6:] == ["--constraint", "/c.txt", "--no-index", "--find-links", "/wheels", "torch"]
    assert "--no-index" not in venv.steps(Path("/v"), Path("/c.txt"), uv, "", ("torch",))[-1]


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [
        ({"bandwidth": Level.OK, "path": Level.OK}, "ok"),
        ({"bandwidth": Level.UNKNOWN, "path": Level.OK}, "unverified"),
        ({"bandwidth": Level.OK, "route": Level.FAIL}, "below bar"),
        ({"bandwidth": Level.FAIL, "path": Level.OK}, "below bar"),
    ],
)
def test_a_link_is_ok_only_if_its_bandwidth_was_held_against_the_bar(levels: dict[str, Level], verdict: str) -> None:
    findings = [Finding(check, level, None, f"{check} is {level}", "mend it") for check, level in levels.items()]
    link = judged(NOTHING, findings)
    assert link.verdict == verdict
    worst = next((one for one in findings if one.level is not Level.OK), findings[0])
    assert (link.evidence, link.fix) == (worst.evidence, "mend it")


def test_a_report_tells_neither_who_nor_how_to_get_in() -> None:
    text = "mac 48:B0:2d:11:22:33\nDGX_SERIAL_NUMBER=123\npassword: x1\nHF_TOKEN=hf_abcdefghij\n"
    text += "uuid GPU-12345678-1234-1234-1234-123456789abc"
    shown = Redactor(names={}).text(text)
    for secret in ("11:22:33", "123\n", "x1", "hf_abc", "GPU-1234"):
        assert secret not in shown
    assert shown.startswith("mac "), "the report still says what was there"
