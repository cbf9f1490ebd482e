from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import Recipe, load_recipe
from orchestrator.errors import UserError
from orchestrator.fault_config import FAULTS, CutLink, SlowRank

RECIPE = """\
name: r
corpus: {sources: [{name: a, path: /data}]}
train: {steps: 30, lr: 1e-4}
faults:
  - {kind: slow_rank, rank: 1, step: 3, factor: 2.5}
  - {kind: cut_link, node: 2, step: 9}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    return file


def test_a_script_of_faults_is_read_and_survives_json(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.faults == (
        SlowRank(kind="slow_rank", rank=1, step=3, factor=2.5),
        CutLink(kind="cut_link", node=2, step=9, seconds=10),
    )
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert [str(fault) for fault in recipe.faults] == ["slow_rank, rank 1", "cut_link, node 2"]
    assert [fault.name for fault in recipe.faults] == ["slow_rank-rank-1-step-3", "cut_link-node-2-step-9"]


@pytest.mark.parametrize("kind", FAULTS)
def test_every_kind_needs_a_step(path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=r"faults\.0\.step is missing"):
        load_recipe(path, [f"faults=[{{kind: {kind}, rank: 0, node: 1, shard: 0}}]"])


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        ("{kind: kill_rnk, rank: 1, step: 2}", 'faults.0.kind="kill_rnk" is no kind of fault', "kill_rank?"),
        ("{rank: 1, step: 2}", "faults.0.kind is missing", ""),
        ("{kind: kill_node, rank: 1, step: 2}", "faults.0.rank is not a key", "known here: kind, step, node, seconds"),
        ("{kind: kill_node, nod: 1, step: 2}", "faults.0.nod is not a key", "did you mean node?"),
        ("{kind: kill_node, node: 0, step: 2}", "faults.0.node=0: input should be greater than or equal to 1", ""),
        ("{kind: slow_rank, rank: 0, step: 2, factor: 1}", "faults.0.factor=1", ""),
        ("{kind: s3_errors, step: 2, answer: none}", 'faults.0.answer="none"', ""),
        ("{kind: kill_driver, step: 31}", "kill_driver at step 31: the run has 30 steps", ""),
        ("{kind: kill_driver, step: 3}, {kind: kill_driver, step: 3}", "kill_driver at step 3 stands twice", ""),
    ],
)
def test_a_wrong_fault_is_refused_with_its_place(path: Path, fault: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(path, [f"faults=[{fault}]"])
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_the_line_of_a_wrong_fault_is_named(path: Path) -> None:
    path.write_text(RECIPE.replace("node: 2", "node: two"))
    with pytest.raises(UserError, match=r"r\.yaml:6 faults\.1\.node=\"two\""):
        load_recipe(path)
