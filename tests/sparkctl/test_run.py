"""`run`, `jobs`, `logs`, `stop`: a recipe over two ranks, and what its owner sees of it."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import stat
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparkctl import __version__
from tests.commandline import SHELL_SECRETS, finished, gone, losses, metrics, wait_for
from tests.terminal import Terminal

pytestmark = pytest.mark.timeout(300)  # the first test that asks for `finished` waits for all of it
SCALARS = ("epoch", "grad_norm", "learning_rate", "loss", "token_accuracy")


def test_detach_prints_the_id_alone() -> None:
    seen = finished()
    assert re.fullmatch(r"tiny-[0-9a-f]{4}\n", seen.detached.stdout)
    assert seen.detached.stderr == ""


def test_a_job_goes_through_its_states_and_leaves_nothing_running() -> None:
    seen = finished()
    assert seen.states[-2:] == ["running", "succeeded"], seen.job.state()
    assert set(seen.states) <= {"staging", "starting", "running", "succeeded"}
    assert len(seen.processes) == 3
    wait_for(lambda: all(gone(pid) for pid in seen.processes), seconds=10)  # the agent ends just after its last word


def test_it_learns_and_logs_each_step() -> None:
    logged = metrics(finished().job)
    steps = [entry for entry in logged if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    assert all({"total_steps", "tokens_per_s", *SCALARS} <= entry.keys() for entry in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [entry["step"] for entry in logged if "eval_loss" in entry] == [6, 12]


def test_tensorboard_has_the_five_charts() -> None:
    seen = finished()
    events = EventAccumulator(str(seen.job.tensorboard)).Reload()
    assert {f"train/{name}" for name in SCALARS} <= set(events.Tags()["scalars"])
    steps = [entry for entry in metrics(seen.job) if "loss" in entry]
    for name in SCALARS:
        points = events.Scalars(f"train/{name}")
        assert [point.step for point in points] == [entry["step"] for entry in steps]
        assert [point.value for point in points] == pytest.approx([entry[name] for entry in steps], rel=1e-6)


def test_each_logged_step_tells_how_busy_both_ranks_are_and_what_they_hold() -> None:
    steps = [entry for entry in metrics(finished().job) if "loss" in entry]
    for entry in steps:
        assert len(entry["busy"]) == len(entry["memory"]) == 2
        assert all(0 <= share <= 1 for share in entry["busy"])
        assert all(100 << 20 < most < 16 << 30 for most in entry["memory"])
    assert any(min(entry["busy"]) < 1 for entry in steps), "two stages always wait for each other now and then"
    assert [entry["seconds"] for entry in steps] == sorted(entry["seconds"] for entry in steps)


def test_the_result_has_a_card_from_which_it_could_be_made_again() -> None:
    seen = finished()
    card = (seen.job.adapter / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["sparkctl", "lora"],
    }  # fmt: skip
    data = seen.commands.folder / "rows.jsonl"
    assert f"| rows.jsonl | qa | `{hashlib.sha256(data.read_bytes()).hexdigest()}` |" in text
    assert f'sparkctl ask {seen.job.id} "your question"' in text
    assert "20 samples to train on, 4 held out" in text
    shown = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert shown is not None
    recipe = yaml.safe_load(shown[1])
    assert recipe["datasets"] == [{"path": "rows.jsonl", "type": "qa", "weight": 1.0}]
    assert (recipe["max_steps"], recipe["lora_r"], recipe["base_model"]) == (12, 4, "model")
    entries = metrics(seen.job)
    assert f"| training, last logged step | 12 | {losses(seen.job)[-1]:.4f} |" in text
    assert f"| evaluation | 12 | {entries[-1]['eval_loss']:.4f} |" in text
    assert f"sparkctl {__version__}, Python" in text
    assert "torch " in text
    assert str(seen.commands.folder) not in card
    assert "hello" not in card


def test_a_second_job_does_not_tokenise_again() -> None:
    seen = finished()
    done = seen.commands("run", "tiny.yaml", "--set", "max_steps=1", "--set", "name=again", "--quiet")
    assert done.returncode == 0, done.stderr
    job = next(job for job in seen.commands.jobs() if job.id.startswith("again-"))
    assert "held out, from the cache of tokens" in job.log(0).read_text()
    tokens = [path for path in (seen.commands.home / "tokens").iterdir() if path.is_dir()]
    assert len(tokens) == 1


def test_on_a_terminal_there_is_a_bar_and_what_lies_below_it() -> None:
    seen = finished()
    argv = seen.commands.argv("run", "tiny.yaml", "--set", "max_steps=6", "--set", "name=shown")
    environment = {**seen.commands.environment, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    with Terminal(argv, cwd=seen.commands.folder, env=environment) as terminal:
        terminal.expect(r"6/6")
        terminal.expect(r"epoch 2\.00  grad norm [\d.e-]+  rate [\d.e-]+  busy \d+% \+ \d+%  memory \d+ MiB \+ \d+ MiB")
        terminal.expect(r"steps +.*6 of 6, 2 epochs")
        terminal.expect(r"sparkctl ask shown-")
        assert terminal.ended() == 0


def test_a_recipe_that_was_finished_before_is_started_anew_and_that_is_said() -> None:
    seen = finished()
    before = {job.id for job in seen.commands.jobs()}  # another test may have run it once more since
    done = seen.commands("run", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    old = re.search(r"^job (\S+) has finished this recipe already; this starts a new one$", done.stdout, re.MULTILINE)
    assert old is not None, done.stdout
    assert old[1] in before
    new = re.search(r"^job (tiny-[0-9a-f]{4}): ", done.stdout, re.MULTILINE)
    assert new is not None
    assert new[1] != seen.job.id
    other = seen.commands("run", "tiny.yaml", "--set", "max_steps=1", "--set", "seed=1")
    assert "already" not in other.stdout


def test_everything_that_listens_is_on_loopback() -> None:
    seen = finished()
    ranks = seen.processes[1:]
    assert {pid for pid, _ in seen.listening} >= set(ranks)  # gloo listens on both ranks: it was looked at in time
    assert all(ipaddress.ip_address(address).is_loopback for _, address in seen.listening), seen.listening


def test_ranks_get_the_inventorys_environment_and_none_of_the_shells_secrets() -> None:
    seen = finished()
    assert set(seen.environments) == {0, 1}
    for rank, environment in seen.environments.items():
        assert environment["RANK"] == str(rank)
        assert environment["INVENTORY_SAYS"] == "hello"
        assert environment["INVENTORY_TOKEN"] == "for-the-ranks"
        assert environment["OMP_NUM_THREADS"] == "1"  # the inventory's, which wins over ours
        assert environment["HF_HUB_OFFLINE"] == "1"
        assert not environment.keys() & SHELL_SECRETS.keys()


def test_no_secret_is_written_down() -> None:
    seen = finished()
    files = [path for path in seen.commands.home.rglob("*") if path.is_file()]
    assert seen.job.spec_file in files
    for path in files:
        content = path.read_bytes()
        assert b"for-the-ranks" not in content, path
        assert not any(secret.encode() in content for secret in SHELL_SECRETS.values()), path
    assert seen.job.spec().env == {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "INVENTORY_SAYS": "hello"}


def test_the_home_is_for_its_owner_alone() -> None:
    home = finished().commands.home
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    for path in home.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_ranks_log_says_what_it_did_and_no_library_chatters() -> None:
    job = finished().job
    held = ["node left holds embedding + layers 0-1 on cpu", "node right holds layers 2-3 + head on cpu"]
    assert job.log(0).read_text().splitlines()[0] == held[0]
    assert job.log(1).read_text().splitlines() == [held[1]]
    assert "20 samples to train on, 4 held out" in job.log(0).read_text()
    assert not re.search(r"warn|deprecat|kernels|\d+%", job.log(0).read_text(), re.IGNORECASE)
    assert job.agent_log.read_text() == ""


def test_logs_show_each_line_with_its_rank() -> None:
    seen = finished()
    shown = seen.commands("logs", seen.job.id).stdout.splitlines()
    assert [line for line in shown if line.startswith("rank 0 | ")]
    assert "rank 1 | node right holds layers 2-3 + head on cpu" in shown
    followed = seen.commands("logs", "-f", "--rank", "1", seen.job.id)  # it has ended, so following ends too
    assert followed.stdout == "rank 1 | node right holds layers 2-3 + head on cpu\n"
    listed = json.loads(seen.commands("logs", "--json", seen.job.id).stdout)
    assert [f"rank {entry['rank']} | {entry['line']}" for entry in listed] == shown


def test_logs_of_a_rank_that_is_not_there_are_wrong_usage() -> None:
    seen = finished()
    done = seen.commands("logs", seen.job.id, "--rank", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --rank 2: job {seen.job.id} has ranks 0 to 1\n")


def test_jobs_show_the_last_training_loss_though_an_evaluation_came_after() -> None:
    seen = finished()
    assert "eval_loss" in metrics(seen.job)[-1]
    row = next(line for line in seen.commands("jobs").stdout.splitlines() if seen.job.id in line)
    assert row.split()[:5] == [seen.job.id, "succeeded", "finetune", "12/12", f"{losses(seen.job)[-1]:.3f}"]
    listed = json.loads(seen.commands("jobs", "--all", "--json").stdout)
    found = next(entry for entry in listed if entry["id"] == seen.job.id)
    assert (found["state"], found["step"], found["loss"]) == ("succeeded", 12, losses(seen.job)[-1])


def test_stop_of_an_ended_job_is_harmless() -> None:
    seen = finished()
    for short in (seen.job.id[-4:], seen.job.id):
        done = seen.commands("stop", short)
        assert (done.returncode, done.stdout) == (0, f"job {seen.job.id} has ended already: succeeded\n")
    assert json.loads(seen.commands("stop", "--json", seen.job.id).stdout) == {"job": seen.job.id, "state": "succeeded"}


def test_one_node_runs_the_recipe_whole_and_gives_the_same_losses() -> None:
    seen = finished()
    done = seen.commands("run", "tiny.yaml", "--set", "nodes=1", "--set", "name=whole")
    assert done.returncode == 0, done.stderr
    job = next(job for job in seen.commands.jobs() if job.id.startswith("whole-"))
    assert job.spec().world_size == 1
    assert losses(job) == pytest.approx(losses(seen.job), abs=1e-6)
    banner, model, _, row, started, *steps, result, board, following = done.stdout.splitlines()
    assert banner == "embedded pair: one rank on this machine over loopback (gloo), no Spark involved"
    assert re.fullmatch(r"model: [\d,]+ parameters, \d+ KiB, 4 layers, pipeline", model)
    assert re.fullmatch(r" +0 +left +embedding \+ layers 0-3 \+ head +\d+ KiB +100%", row)
    assert started == f"job {job.id}: {job.path}"
    assert steps[0].startswith("step 1/12: epoch 0.33, loss ")
    last, *summary = steps[steps.index(next(line for line in steps if line.startswith("step 12: "))) :]
    assert last.startswith("step 12: evaluation loss ")
    assert [line.split()[0] for line in summary] == ["steps", "loss", "evaluation", "speed", "time", "busy", "memory"]
    first = metrics(job)[0]["loss"]
    assert re.fullmatch(rf"loss +{first:.4f} -> {losses(job)[-1]:.4f}, token accuracy [\d.]+%", summary[1])
    assert re.fullmatch(r"busy +100%", summary[5])
    assert result == f"result       {job.adapter}"
    assert board == f"TensorBoard  {job.tensorboard}"
    assert following == f'next         sparkctl ask {job.id} "your question"'


def test_a_named_node_runs_the_recipe_whole_and_json_is_one_document() -> None:
    seen = finished()
    done = seen.commands("run", "tiny.yaml", "--json", "--set", "nodes=right", "--set", "name=right")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    job = next(job for job in seen.commands.jobs() if job.id == document["job"])
    assert [rank.node for rank in job.spec().ranks] == ["right"]
    assert (document["state"], document["folder"]) == ("succeeded", str(job.path))
    assert document["last"] == metrics(job)[-2]
    assert losses(job) == pytest.approx(losses(seen.job), abs=1e-6)


def test_plan_says_who_holds_what() -> None:
    shown = finished().commands("plan", "tiny.yaml").stdout.splitlines()
    assert shown[0] == "embedded pair: two ranks on this machine over loopback (gloo), no Spark involved"
    nodes = next(line for line in shown if line.startswith("memory"))
    assert re.fullmatch(r"memory +left \(rank 0\) +right \(rank 1\)", nodes)
    held = next(line for line in shown if line.startswith("  holds"))
    assert re.fullmatch(r"  holds +embedding \+ layers 0-1 +layers 2-3 \+ head", held)


def test_dry_run_checks_and_starts_nothing() -> None:
    seen = finished()
    before = seen.commands.jobs()
    document = json.loads(seen.commands("run", "--dry-run", "--json", "tiny.yaml").stdout)
    assert (document["name"], document["strategy"], document["embedded"]) == ("tiny", "pipeline", True)
    assert [job.id for job in seen.commands.jobs()] == [job.id for job in before]


def test_a_damaged_job_does_not_hide_the_others(tmp_path: Path) -> None:
    seen = finished()
    broken = seen.commands.home / "jobs" / "broken-0000"
    broken.mkdir(mode=0o700)
    try:
        (broken / "spec.json").touch(0o600)
        done = seen.commands("jobs")
        assert re.search(r"^broken-0000 +damaged ", done.stdout, re.MULTILINE)
        assert seen.job.id in done.stdout
    finally:
        (broken / "spec.json").unlink()
        broken.rmdir()
