"""Who may import whom: the shape of the project, held by a test."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("orchestrator", "jobs", "serve")
ENGINE = (
    "engine",
    "stage",
    "tensor_parallel",
    "pipeline",
    "fragments",
    "zero",
    "checkpoints",
    "planners",
    "fragment_files",
    "saver",
    "models",
    "weights",
    "safetensors_files",
    "replicas",
    "spikes",
    "sample_losses",
    "watch",
    "verdicts",
    "integrity",
    "profiling",
    "self_test",
    "speeds",
    "timing",
    "stragglers",
    "beats",
    "stacks",
    "state_bytes",
    "calibration_steps",
)


def imports(file: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules(*parts: str) -> list[Path]:
    return [
        f for part in parts for f in ([ROOT / part] if part.endswith(".py") else sorted((ROOT / part).rglob("*.py")))
    ]


def uses(file: Path, *names: str, top_level_only: bool = False) -> set[str]:
    return {i for i in imports(file, top_level_only) for n in names if i == n or i.startswith(n + ".")}


@pytest.mark.parametrize("file", modules("orchestrator/data", "orchestrator/train", "orchestrator/planning"), ids=str)
def test_the_lower_layers_know_nothing_of_the_upper_ones(file: Path) -> None:
    upper = ("supervisor", "stages", "cli", "report", "report_content", "report_plots", "status", "doctor")
    assert not uses(file, "serve", "jobs", *(f"orchestrator.{name}" for name in upper))


@pytest.mark.parametrize(
    "file",
    modules(
        "orchestrator/planning",
        "orchestrator/failures.py",
        "orchestrator/endings.py",
        "orchestrator/findings.py",
        "orchestrator/goodput.py",
        "orchestrator/attempt_rows.py",
        "orchestrator/hangs.py",
        "orchestrator/data/order.py",
        "orchestrator/train/spikes.py",
        "orchestrator/train/learning_rate.py",
    ),
    ids=str,
)
def test_decisions_are_pure(file: Path) -> None:
    assert not uses(file, "ray", "torch", "deepspeed", "time", "orchestrator.storage", "orchestrator.runs")


@pytest.mark.parametrize(
    "file",
    modules(*(f"orchestrator/train/{name}.py" for name in ENGINE)),
    ids=str,
)
def test_the_engine_runs_without_ray(file: Path) -> None:
    assert not uses(file, "ray")


@pytest.mark.parametrize("file", modules(*PACKAGES), ids=str)
def test_boto3_is_imported_in_one_place(file: Path) -> None:
    assert file.name == "storage.py" or not uses(file, "boto3", "botocore")


@pytest.mark.parametrize("file", modules("orchestrator"), ids=str)
def test_heavy_imports_happen_where_they_are_used(file: Path) -> None:
    assert file.stem in {*ENGINE, "transport"} - {"checkpoints"} or not uses(
        file, "ray", "torch", "transformers", "deepspeed", "pyarrow", top_level_only=True
    )


def test_help_answers_in_half_a_second() -> None:
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "orchestrator", "--help"], check=True, capture_output=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(5)) < 0.5  # of its processor, since the machine may be busy
