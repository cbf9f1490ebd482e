"""Faults of every kind over one run, on several nodes: what it comes to is what the undisturbed run comes to."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator import storage
from orchestrator.chaos.disk import SmallDisk, small_disk
from orchestrator.chaos.hosts import network
from orchestrator.chaos.local_cluster import LocalCluster, Size, local_cluster
from orchestrator.chaos.player import Player
from orchestrator.chaos.score import score, table
from orchestrator.chaos.show import play
from orchestrator.config import load_recipe
from orchestrator.runs import RunDir
from orchestrator.simulation.replay import replay
from orchestrator.train import checkpoints
from tests.e2e.conftest import wait_for

STEPS = 200
WORDS = [begin + end for begin in "ca to ri mel sor ban lu pre".split() for end in "n der ment sis tal".split()]
RECIPE = """
name: calm
corpus:
  sources: [{{name: words, path: {folder}/words.jsonl}}]
  near_duplicates: null
  held_out: 0.05
  quality: {{min_characters: 10, min_prose_share: null, max_duplicate_line_share: null, max_top_ngram_share: null}}
tokenizer: {{vocab_size: 400}}
model: {{layers: 2, hidden_size: 32, heads: 2}}
train:
  sequence_length: 32
  global_batch_size: 12
  steps: 200
  lr: 1.0e-3
  checkpoint_every: 10
  workers: {{min: 1, max: 2}}
  cpus_per_worker: 1
"""
FEW = """[
  {kind: kill_rank, rank: 1, step: 5},
  {kind: slow_rank, rank: 0, step: 20, factor: 2, steps: 5},
  {kind: kill_node, node: 2, step: 50, seconds: 4},
  {kind: error_rank, rank: 0, step: 110},
  {kind: kill_driver, step: 150}]"""
"""So far apart that the player, who looks five times a second, finds the run where the script wants it."""
MANY = {
    "kill_rank, rank: {n}": 13,
    "error_rank, rank: {n}": 3,
    "hang_rank, rank: {n}": 4,
    "slow_rank, rank: {n}, steps: 5": 5,
    "kill_node, node: {m}, seconds: 4": 4,
    "kill_node, node: {m}, seconds: 25": 4,
    "cut_link, node: {m}, seconds: 3": 3,
    "cut_link, node: {m}, seconds: 20": 3,
    "drain_node, node: {m}, deadline_s: 20, seconds: 2": 5,
    "fill_disk, seconds: 3": 2,
    "fill_disk, seconds: 20": 2,
    "kill_driver": 5,
}
"""How many of each, with n for a rank and m for a node; longer and shorter than a restart takes. No oom_rank: no layout
of so small a model takes less memory, and the run would rightly end. Shards are corrupted on S3, below: on a disk there
is no other copy."""
GAPS = (*(12,) * 7, 150)
"""Steps from a fault to the next, in turn: in the longest the next attempt's workers come to stand by."""
SLOWER = (
    "model={layers: 4, hidden_size: 160, heads: 4}",
    "train.sequence_length=64",
    "train.global_batch_size=16",
    # Another number of workers rounds otherwise. Where texts are learned by heart such differences grow: at a rate of
    # 1e-4 from 1e-8 of the loss to 1e-3 in a thousand steps. What a step sees shows in its loss at any rate.
    "train.lr=2.0e-5",
)
ON_S3 = """[
  {kind: s3_errors, step: 20, seconds: 4},
  {kind: corrupt_shard, shard: 0, step: 50, seconds: 60},
  {kind: kill_rank, rank: 0, step: 60},
  {kind: s3_errors, answer: slow, delay_s: 0.5, step: 100, seconds: 5},
  {kind: s3_errors, step: 130, seconds: 30},
  {kind: kill_rank, rank: 1, step: 135}]"""
LEFT = """
import json, ray, sys
from ray.util import placement_group_table
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
groups = [row["name"] for row in placement_group_table().values() if row["state"] != "REMOVED"]
print(json.dumps({"groups": groups, "cpus": ray.available_resources().get("CPU", 0)}))
"""
PROCESSES = """
import json, os, psutil
found = [process.name() for process in psutil.process_iter()]
print(json.dumps({"processes": found, "shared_memory": os.listdir("/dev/shm")}))
"""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the tests play on."""

    cluster: LocalCluster
    disk: SmallDisk | None
    folder: Path
    recipe: Path
    before: list[Any]
    """What was on the nodes when nothing had run yet."""

    @property
    def storage(self) -> str:
        return str(self.disk.folder if self.disk else self.folder / "storage")

    def command(self, *overrides: str) -> list[str]:
        command = [sys.executable, "-m", "orchestrator", "run", str(self.recipe), f"storage={self.storage}", *overrides]
        return [*command, "--address", self.cluster.address, "--stage", "train"]

    def calm(self, steps: int, *overrides: str) -> RunDir:
        """The undisturbed run of so many steps, on the corpus that all share."""
        run = RunDir(f"{self.storage}/calm-{steps}")
        train = self.command(f"train.steps={steps}", f"name={run.name}", *overrides)
        run_on(self.cluster, [*train[:-1], "corpus"])
        run_on(self.cluster, train, timeout_s=1800)
        return run

    def disturbed(self, calm: RunDir, faults: str, *overrides: str) -> RunDir:
        """The same run with faults, through all of them."""
        steps = calm.recipe().train.steps
        run = RunDir(f"{self.storage}/disturbed-{steps}")
        shutil.copytree(calm.corpus, run.corpus)
        values = [f"train.steps={steps}", f"name={run.name}", f"faults={' '.join(faults.split())}", *overrides]
        recipe = load_recipe(self.recipe, values)
        log = (self.folder / "driver.log").open("w")
        with log:
            player = Player(run, recipe.faults, self.cluster, self.command(*values), self.disk, out=log)
            code = player.play()
        rows = score(recipe.faults, run.events(), run.metric_lines())
        print("\n" + table(rows))
        assert code == 0, (self.folder / "driver.log").read_text()[-6000:]
        assert [row.fault for row in rows if not row.struck] == []
        return run


def run_on(cluster: LocalCluster, command: Sequence[str], node: int = 0, timeout_s: float = 600) -> str:
    process = cluster.popen(command, subprocess.PIPE, node)
    said, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, said[-4000:]
    return said


def on_node(cluster: LocalCluster, script: str, node: int = 0) -> Any:
    return json.loads(run_on(cluster, [sys.executable, "-c", script, cluster.address], node).splitlines()[-1])


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("chaos")
    write_recipe(folder)
    with (
        small_disk(folder / "disk", 512) as disk,
        network() as made,
        local_cluster(Size(nodes=2, cpus=1), made) as cluster,
    ):
        before = [on_node(cluster, PROCESSES, node) for node in (0, *cluster.nodes)]
        yield Stage(cluster=cluster, disk=disk, folder=folder, recipe=folder / "r.yaml", before=before)


def write_recipe(folder: Path) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(10, 40))) for _ in range(400)]
    (folder / "words.jsonl").write_text("".join(json.dumps({"text": text + "."}) + "\n" for text in texts))
    (folder / "r.yaml").write_text(RECIPE.format(folder=folder))


def check_same(run: RunDir, calm: RunDir) -> None:
    """Every step was made once, from the samples and to the numbers of the undisturbed run."""
    found, expected = run.loss_curve(), calm.loss_curve()
    steps = calm.recipe().train.steps
    assert sorted(found) == sorted(expected) == [*range(1, steps + 1)]
    worst = max(abs(found[step]["loss"] / expected[step]["loss"] - 1) for step in expected)
    print(f"{steps} steps in {len(run.attempts())} attempts: losses at most {worst:.1e} from the undisturbed ones")
    assert worst < 1e-5
    assert [line["tokens"] for _, line in sorted(found.items())] == [e["tokens"] for _, e in sorted(expected.items())]
    one, other = (checkpoints.read_commit(r.checkpoints, steps) for r in (run, calm))
    assert (one.position.updates, one.position.past) == (other.position.updates, other.position.past)
    check_ledger(run)


def check_simulated(run: RunDir) -> None:
    """The simulation of what the run went through takes as long."""
    found = replay(run)
    real, simulated = found.real.wall_s, found.simulated.wall_s
    print(f"wall time {real:.1f} s, simulated {simulated:.1f} s; goodput {found.goodput_error:+.3f}")
    assert simulated == pytest.approx(real, rel=0.1)


def check_ledger(run: RunDir) -> None:
    """Every attempt went on with the step after its checkpoint, and left none out."""
    began = {e["attempt"]: e["resume_step"] for e in run.events() if e["event"] == "attempt_started"}
    for attempt, resumed in began.items():
        steps = [line["step"] for line in run.metric_lines(attempt)]
        assert steps == [*range(resumed + 1, resumed + 1 + len(steps))], f"attempt {attempt}"


def check_nothing_is_left(stage: Stage) -> None:
    """Neither placement groups, nor processes of attempts, nor shared memory."""
    cluster = stage.cluster
    wait_for(lambda: on_node(cluster, LEFT) == {"groups": [], "cpus": 2.0}, "placement groups and CPUs", 60)
    for node, before in zip((0, *cluster.nodes), stage.before, strict=True):
        found = on_node(cluster, PROCESSES, node)
        trained = [name for name in found["processes"] if "Train" in name or "Agent(" in name]
        assert trained == [], f"node {node}"
        # Of a node that was replaced, only the kinds can be compared.
        kinds = [{name.rstrip("0123456789") for name in seen["shared_memory"]} for seen in (found, before)]
        assert kinds[0] <= kinds[1], f"node {node}"


def test_a_run_survives_five_faults(stage: Stage) -> None:
    calm = stage.calm(STEPS)
    run = stage.disturbed(calm, FEW)
    check_same(run, calm)
    check_nothing_is_left(stage)
    check_simulated(run)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_run_survives_fifty_faults_of_all_kinds(stage: Stage) -> None:
    kinds = [kind for kind, count in MANY.items() for _ in range(count) if stage.disk or "fill_disk" not in kind]
    assert len(kinds) >= 50
    steps = list(itertools.accumulate(itertools.islice(itertools.cycle(GAPS), len(kinds)), initial=40))
    calm = stage.calm(steps[-1], *SLOWER)
    run = stage.disturbed(calm, script(kinds, steps), "train.max_restarts=20", "train.hang_after_s=10", *SLOWER)
    assert sum(event["event"] == "fault_injected" for event in run.events()) == len(kinds)
    check_same(run, calm)
    check_nothing_is_left(stage)
    check_simulated(run)


def script(kinds: Sequence[str], steps: Sequence[int]) -> str:
    """Faults in an order of chance."""
    draw = random.Random(7)
    chosen = [kind.format(n=draw.randrange(2), m=draw.randrange(1, 3)) for kind in draw.sample(kinds, len(kinds))]
    return "[" + ", ".join(f"{{kind: {kind}, step: {step}}}" for kind, step in zip(chosen, steps, strict=False)) + "]"


@pytest.mark.soak
def test_a_run_survives_an_object_store_that_fails(bucket: str, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    runs = []
    for name, faults in (("calm", "[]"), ("disturbed", " ".join(ON_S3.split()))):
        values = [f"storage={bucket}", f"name={name}", f"faults={faults}"]
        with (tmp_path / f"{name}.log").open("w") as out:
            played = play(str(tmp_path / "r.yaml"), values, ("train",) if runs else ("corpus", "train"), out)
        print("\n" + table(played.rows))
        assert played.exit_code == 0, (tmp_path / f"{name}.log").read_text()[-4000:]
        assert all(row.struck for row in played.rows)
        runs.append(played.run)
        if name == "calm":
            copy_corpus(played.run, RunDir(f"{bucket}/disturbed"), tmp_path / "corpus")
    check_same(runs[1], runs[0])


def copy_corpus(run: RunDir, to: RunDir, through: Path) -> None:
    storage.download_directory(run.corpus, through)
    storage.upload_directory(through, to.corpus)
