"""On two simulated hosts: wherever a model lies, each node ends with what its own rank reads, and no node with more."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import inventory, record, transport
from cluster.errors import WrongInputError
from launch import halves, origin
from launch.halves import Placed, Site, Wants
from launch.split import Cut, whole
from tests import models
from tests.lab import Host
from tests.laptop import Laptop
from tests.launch.loopback_hub import Hub, serving

pytestmark = pytest.mark.timeout(240)  # the first boots the pair

LAYERS = 4
THERE = "/home/spark/models/small"


@dataclass
class Pair:
    """A laptop and its nodes, and the model folder that the laptop has."""

    laptop: Laptop
    sites: tuple[Site, ...]
    model: Path

    @property
    def cuts(self) -> dict[str, Cut]:
        head, peer = self.sites
        return {head.name: Cut(0, 2, LAYERS), peer.name: Cut(2, LAYERS, LAYERS)}

    def find(self, reference: str, what: str = "model") -> origin.Origin:
        return origin.find(reference, [site.transport for site in self.sites], local=None, what=what)

    def place(self, wants: Wants, cuts: dict[str, Cut] | None = None) -> list[Placed]:
        placed = halves.place(wants, cuts or self.cuts, self.sites, lambda progress: None)
        return [placed[name] for name in cuts or self.cuts]

    def stored(self, host: Host, folder: str) -> int:
        shown = host.run(["find", folder, "-name", "*.safetensors", "-printf", "%s\n"]).stdout
        return sum(map(int, shown.split()))

    def assert_halves(self, placed: list[Placed], *, made_on: tuple[int, ...]) -> None:
        """The two folders hold the model's tensors between them, and those that were made nothing else."""
        size = (self.model / "model.safetensors").stat().st_size
        hosts = self.laptop.lab.hosts
        found = [self.stored(host, one.model) for host, one in zip(hosts, placed, strict=True)]
        for number, (host, one) in enumerate(zip(hosts, placed, strict=True)):
            assert host.run(["cat", f"{one.model}/config.json"]).stdout == (self.model / "config.json").read_text()
            assert host.run(["test", "-s", f"{one.model}/tokenizer.json"]).returncode == 0
            if number in made_on:
                assert one.model.startswith(f"{host.home}/.sparkctl/halves/")
                assert found[number] < 0.6 * size
                assert host.run(["stat", "-c", "%a", one.model]).stdout == "700\n"
            else:
                assert found[number] == size
        if made_on == (0, 1):
            assert size <= sum(found) < size * 1.02 + 8192


@pytest.fixture(scope="module")
def pair(laptop: Laptop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(laptop.lab.home))
        patch.delenv("SPARKCTL_HOME", raising=False)
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        mine = inventory.load(laptop.inventory)
        known = record.load(mine)
        assert known is not None
        transports = [transport.to(node) for node in mine.nodes]
        model = models.make(tmp_path_factory.mktemp("own") / "small", hidden_size=256, intermediate_size=512)
        try:
            yield Pair(laptop, halves.sites(known, transports), model)
        finally:
            for one in transports:
                one.close()


@pytest.fixture(autouse=True)
def _tidy(pair: Pair) -> Iterator[None]:
    yield
    for host in pair.laptop.lab.hosts:
        host.run(["rm", "-rf", ".sparkctl/halves", "models"])


def put(host: Host, source: Path, target: str) -> None:
    for path in source.iterdir():
        host.write(f"{target}/{path.name}", path.read_bytes())


def test_a_model_of_the_laptop_goes_in_halves(pair: Pair) -> None:
    placed = pair.place(Wants(pair.find(str(pair.model))))
    pair.assert_halves(placed, made_on=(0, 1))
    before = [host.counters("enP7s7").received for host in pair.laptop.lab.hosts]
    assert pair.place(Wants(pair.find(str(pair.model)))) == placed  # there already
    for host, came in zip(pair.laptop.lab.hosts, before, strict=True):
        assert host.counters("enP7s7").received - came < 400_000  # a question and our copier, no weights


@pytest.mark.parametrize("owner", [0, 1])
@pytest.mark.parametrize("named", [False, True], ids=["path", "node-and-path"])
def test_a_model_of_one_node_stays_there_and_its_half_goes_over_the_link(pair: Pair, owner: int, named: bool) -> None:
    hosts = pair.laptop.lab.hosts
    put(hosts[owner], pair.model, THERE)
    other = hosts[1 - owner]
    before = {name: other.counters(name).received for name in (*other.rails, "enP7s7")}
    found = pair.find(f"{hosts[owner].name}:~/models/small" if named else THERE)
    assert found.card().layers == LAYERS
    placed = pair.place(Wants(found))
    pair.assert_halves(placed, made_on=(1 - owner,))
    assert placed[owner].model == THERE
    came = {name: other.counters(name).received - before[name] for name in before}
    half = pair.stored(other, placed[1 - owner].model)
    assert sum(came[rail] for rail in other.rails) > half
    assert came["enP7s7"] < half / 2


def test_a_model_that_both_nodes_have_is_not_copied(pair: Pair) -> None:
    for host in pair.laptop.lab.hosts:
        put(host, pair.model, THERE)
    placed = pair.place(Wants(pair.find(THERE)))
    assert [one.model for one in placed] == [THERE, THERE]
    for host in pair.laptop.lab.hosts:
        assert host.run(["test", "-e", ".sparkctl/halves"], check=False).returncode


def test_one_node_gets_all_of_it(pair: Pair) -> None:
    peer = pair.laptop.lab.hosts[1]
    (placed,) = pair.place(Wants(pair.find(str(pair.model))), {peer.name: whole(LAYERS)})
    assert pair.stored(peer, placed.model) == (pair.model / "model.safetensors").stat().st_size
    head = pair.laptop.lab.hosts[0]
    assert head.run(["test", "-e", ".sparkctl/halves"], check=False).returncode


def test_data_and_adapters_travel_whole(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"question": "?", "answer": "!"}\n')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    data, adapter = pair.find(str(tmp_path / "pairs.jsonl"), "dataset"), pair.find(str(tmp_path / "adapter"), "adapter")
    placed = pair.place(Wants(pair.find(str(pair.model)), (data,), {"own": adapter}))
    for host, one in zip(pair.laptop.lab.hosts, placed, strict=True):
        assert host.read(one.datasets[0]) == (tmp_path / "pairs.jsonl").read_bytes()
        assert one.datasets[0].endswith("/pairs.jsonl")
        assert host.read(f"{one.adapters['own']}/adapter_config.json") == b"{}"


def test_each_node_asks_the_hub_for_its_own(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_for_the_hub")
    here = str(pair.laptop.head.address).rpartition(".")[0] + ".1"  # this machine, as the hosts see it
    level = logging.getLogger("huggingface_hub").level
    with serving(Hub({"org/small": pair.model}, private="hf_for_the_hub"), here) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        placed = pair.place(Wants(pair.find("org/small")))
        pair.assert_halves(placed, made_on=(0, 1))
        size = (pair.model / "model.safetensors").stat().st_size
        assert hub.sent < 1.5 * size  # both halves, the header once more, and the small files twice
    logging.getLogger("huggingface_hub").setLevel(level)
    for host in pair.laptop.lab.hosts:
        found = host.run(["grep", "-rl", "hf_for_the_hub", "/home/spark", "/tmp"], "root", check=False).stdout
        assert found == ""


def test_what_is_nowhere_is_told_with_every_place(pair: Pair) -> None:
    with pytest.raises(WrongInputError, match="/absent: no such model here or on spark-a or on spark-b"):
        pair.find("/absent")
    with pytest.raises(WrongInputError, match="spark-b:/absent: spark-b has nothing there"):
        pair.find("spark-b:/absent")
