"""What is planned for a pair that has been made counts what its nodes have, not what a Spark would."""

from __future__ import annotations

import json

import pytest

from launch import box
from tests.laptop import Laptop

pytestmark = pytest.mark.timeout(300)


def test_the_nodes_of_a_pair_tell_what_memory_they_have(laptop: Laptop) -> None:
    recipe = laptop.recipe("planned")
    told = laptop("plan", recipe, "--json")
    assert told.returncode == 0, told.stderr
    here = box.this_memory()
    assert here is not None
    for rank in json.loads(told.stdout)["ranks"]:
        assert rank["box"]["total"] == here.total, "the simulated hosts see this machine's memory"
        assert 0 < rank["box"]["available"] <= here.total
        assert rank["box"]["about"] == "as the node says"
    asked = json.loads(laptop("plan", recipe, "--json", "--memory", "64").stdout)["ranks"]
    assert {rank["box"]["total"] for rank in asked} == {64 * box.GIB}


def test_a_model_that_lies_on_a_node_is_planned_from_there(laptop: Laptop) -> None:
    here = json.loads(laptop("plan", laptop.recipe("planned"), "--json").stdout)
    lab = laptop.lab
    folder = f"{lab.hosts[1].home}/only-here"
    lab.hosts[1].run(["mkdir", "-p", folder])
    for path in (laptop.shared / "model").iterdir():
        lab.hosts[1].write(f"{folder}/{path.name}", path.read_bytes())
    for reference in (folder, f"spark-b:{folder}", "spark-b:~/only-here"):
        told = laptop("plan", laptop.recipe("planned", base_model=reference), "--json")
        assert told.returncode == 0, told.stderr
        document = json.loads(told.stdout)
        assert (document["parameters"], document["bytes"]) == (here["parameters"], here["bytes"])
    absent = laptop("plan", laptop.recipe("planned", base_model="/no/such/folder"))
    assert absent.returncode == 2
    assert absent.stderr.startswith("error: /no/such/folder: no such model")
