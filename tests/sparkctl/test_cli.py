"""The command line itself: quick to start, its own rooms first, errors in two lines and an exit status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparkctl
from sparkctl.cli import VERBS, main

# Prints the top-level modules that calling `sparkctl ARGUMENTS` has loaded, beyond those of Python itself.
_LOADED = """
import sys
before = set(sys.modules)
from sparkctl.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}), file=sys.stderr)
"""
_ROOMS = {"sparkctl", "cluster", "launch"}
# Of the standard library, what would be felt.
_SLOW = {"asyncio", "multiprocessing", "ssl", "http", "unittest", "sqlite3", "concurrent", "xml"}


def _loaded(*arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", _LOADED, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("Usage: sparkctl"), done.stdout
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=lambda given: given[0])
def test_help_loads_click_and_nothing_else(arguments: list[str]) -> None:
    loaded = _loaded(*arguments)
    assert loaded - set(sys.stdlib_module_names) - _ROOMS == {"click"}
    assert not loaded & _SLOW


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert _status("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in VERBS)
    assert "agent" not in shown
    assert "worker" not in shown


def _status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert _status("--version") == 0
    assert capsys.readouterr().out == f"sparkctl, version {sparkctl.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["jbos"], "error: no such verb: jbos; did you mean jobs?\n  try: sparkctl --help\n"),
        (["zzz"], "error: no such verb: zzz\n  try: sparkctl --help\n"),
        (["plan"], "error: Missing argument 'RECIPE'.\n  try: sparkctl plan --help\n"),
        (
            ["logs", "x", "--rank", "-1"],
            "error: Invalid value for '--rank': -1 is not in the range x>=0.\n  try: sparkctl logs --help\n",
        ),
    ],
)
def test_wrong_usage_is_status_2_and_names_the_way_out(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _status(*arguments) == 2
    assert capsys.readouterr() == ("", told)


def test_a_reader_that_has_enough_is_met_with_silence() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "sparkctl", "recipes", "--schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1


def test_an_unusable_home_is_told_in_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "file" / "home"))
    assert _status("jobs") == 1
    assert capsys.readouterr() == (
        "",
        f"error: {tmp_path}/file/home: cannot be made (Not a directory)\n  try: set $SPARKCTL_HOME to a folder of yours\n",
    )


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    """A folder with a `launch`, as ROS 2 has one, and a `cluster` of somebody else's."""
    for name in ("launch", "cluster"):
        (tmp_path / "strangers" / name).mkdir(parents=True)
        (tmp_path / "strangers" / name / "__init__.py").write_text("STRANGER = True\n")
        (tmp_path / "strangers" / name / "job.py").write_text("STRANGER = True\n")
    return tmp_path / "strangers"


_CONSOLE_SCRIPT = Path(sys.executable).with_name("sparkctl")


@pytest.mark.parametrize("start", [[sys.executable, "-m", "sparkctl"], [str(_CONSOLE_SCRIPT)]], ids=["-m", "script"])
def test_our_rooms_win_over_strangers_on_the_path(start: list[str], strangers: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(strangers), "SPARKCTL_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*start, "jobs", "--json"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_our_rooms_win_where_a_stranger_was_imported_before(strangers: Path) -> None:
    script = (
        "import launch.job, cluster; import sparkctl; import launch.split, cluster.errors; print(launch.split.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(strangers)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == str(Path(sparkctl.__file__).parents[1] / "launch" / "split.py")


def test_our_rooms_win_when_installed_plainly(strangers: Path, tmp_path: Path) -> None:
    # A wheel unpacks the three packages side by side; to build one needs hatchling, which is not there in a test.
    site, source = tmp_path / "site", Path(sparkctl.__file__).parents[1]
    for room in sorted(_ROOMS):
        shutil.copytree(source / room, site / room, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(strangers), str(site)]),
        "SPARKCTL_HOME": str(tmp_path / "home"),
    }
    script = "import sparkctl, launch.job, cluster.files; print(sparkctl.__file__, launch.job.__file__, cluster.files.__file__)"
    for arguments, told in (
        (["-c", script], [str(site / part) for part in ("sparkctl/__init__.py", "launch/job.py", "cluster/files.py")]),
        (["-m", "sparkctl", "jobs", "--json"], ["[]"]),
    ):
        done = subprocess.run(
            [sys.executable, "-P", *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.stdout.split(), done.stderr) == (told, "")


def test_the_recipes_schema_is_valid_and_knows_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert _status("recipes", "--schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    kinds = {
        definition["properties"]["kind"]["const"] for name, definition in schema["$defs"].items() if "Recipe" in name
    }
    assert kinds == {"finetune", "inference", "command"}


def test_the_ready_recipes_are_listed_and_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert _status("recipes", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [Path(entry["path"]).name for entry in listed] == sorted(Path(entry["path"]).name for entry in listed)
    assert listed
    assert all(Path(entry["path"]).is_file() and entry["about"] for entry in listed)
    assert _status("recipes") == 0
    shown = capsys.readouterr().out
    assert all(Path(entry["path"]).name in shown and entry["about"] in shown for entry in listed)
