"""The report of synthetic run directories, from empty to finished, and the attempt rows that it is built on."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orchestrator import storage
from orchestrator.attempt_rows import attempt_rows
from orchestrator.report import write_report
from orchestrator.runs import RunDir

BEGIN = 1_760_000_000.0
EVIL = "<script>alert(1)</script>"


def event(run: RunDir, name: str, second: float, **facts: Any) -> None:
    """Append an event whose time is `second` after the run began."""
    number = len(run.events()) + 1
    run.write_json(run.path("events", f"{number:06d}-{name}.json"), {"event": name, "time": BEGIN + second, **facts})


def write_metrics(run: RunDir, attempt: int, steps: range, start: float) -> None:
    lines = []
    for index, step in enumerate(steps):
        lines.append(
            {
                "attempt": attempt,
                "step": step,
                "time": BEGIN + start + index * 0.9,
                "loss": 4.1 + 4.9 * math.exp(-step / 18) + 0.12 * math.sin(step * 2.7),
                "grad_norm": 1.1 + 2.5 * math.exp(-step / 6) + 0.2 * math.sin(step * 1.9),
                "lr": 3e-4 * min(1, step / 10) * (1 - 0.9 * max(0, step - 10) / 50),
                "tokens": step * 4096,
                "tokens_per_second": 4600 + 260 * math.sin(step * 3.1) - (2900 if index == 0 else 0),
                "step_time_s": 0.9,
                "data_s": 0.004,
                "compute_s": 0.85,
                "checkpoint_s": 0.21 if step % 10 == 0 else 0.0,
            }
        )
    storage.write(run.metrics(attempt), "".join(json.dumps(line) + "\n" for line in lines).encode())


def plan(workers: int, accumulation: int) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "nodes": 1,
        "data_parallel": workers,
        "pipeline_stages": 1,
        "tensor_parallel": 1,
        "zero_stage": 2,
        "micro_batch_size": 8,
        "accumulation": accumulation,
        "dtype": "fp32",
        "parameters": 4_900_000,
        "memory_bytes": 118_000_000,
        "step_time_s": 0.8,
        "reason": f"{workers} workers x micro-batch 8 x {accumulation} fill the global batch of 32",
        "losers": ["zero_stage=3: 14 % slower"],
    }


def write_recipe(run: RunDir) -> None:
    train = {"steps": 60, "lr": 3e-4, "schedule": "linear", "warmup_steps": 10, "global_batch_size": 32, "seed": 7}
    recipe = {
        "name": run.name,
        "model": {"path": None, "architecture": "galactica", "layers": 4, "hidden_size": 256, "heads": 8},
        "train": {**train, "sequence_length": 128, "workers": {"min": 1, "max": 4}},
    }
    run.write_json(run.resolved, {"recipe": recipe, "versions": {"terrane": "0.1.0", "ray": "2.60.0"}})


def write_corpus(run: RunDir) -> None:
    splits = {
        "train": {"sequences": 9_120, "tokens": 1_167_360, "shards": ["a", "b", "c"]},
        "held_out": {"sequences": 96, "tokens": 12_288, "shards": ["d"]},
    }
    manifest = {
        "format": 1,
        "hash": "8f2c61d0a7b94e1f",
        "sequence_length": 128,
        "vocab_size": 8_192,
        "documents": {"read": 1_480, "kept": 1_312, "dropped": {"too_short": 121, "duplicate": 47}},
        "sources": {"python-docs": {"documents": 1_102, "characters": 4_210_337}, EVIL: {"documents": 378}},
        "splits": splits,
        "tail_tokens_dropped": 61,
    }
    run.write_json(run.corpus_manifest, manifest)


def write_training(run: RunDir) -> None:
    """Attempt 1 does steps 1 to 27 and loses a worker, 2 fails before a step, 3 does steps 21 to 60."""
    event(run, "stage_started", 31.2, stage="train")
    for number, workers, begin in ((1, 4, 32.0), (2, 3, 67.5), (3, 2, 72.0)):
        run.write_json(run.plan(number), plan(workers, 8 // workers))
        event(
            run, "planned", begin, attempt=number, plan=plan(workers, 8 // workers), reason=f"{workers} CPUs are free"
        )
        event(
            run, "attempt_started", begin + 0.1, attempt=number, workers=workers, resume_step=0 if number == 1 else 20
        )
        if number == 1:
            event(run, "first_step", 40.0, attempt=1, step=1)
            event(run, "committed", 49.0, attempt=1, step=10, seconds=0.2, bytes=58_000_000)
            event(run, "committed", 58.0, attempt=1, step=20, seconds=0.2, bytes=58_000_000)
            event(run, "fault_injected", 64.5, kind="kill_rank", rank=1, step=27)
            ended = {"outcome": "worker_lost", "message": f"rank 1 died of SIGKILL {EVIL}", "last_step": 27}
            event(run, "attempt_ended", 66.0, attempt=1, **ended)
        elif number == 2:
            ended = {"outcome": "out_of_memory", "message": "rank 0: 1.2 GiB asked, 0.8 GiB free", "last_step": 20}
            event(run, "attempt_ended", 71.0, attempt=2, **ended)
        if number < 3:
            event(run, "decided", 71.2 if number == 2 else 66.2, attempt=number, action="restart", reason="3 left")
    event(run, "first_step", 78.6, attempt=3, step=21)
    for step in (30, 40, 50, 60):
        event(run, "committed", 78 + (step - 20) * 0.9, attempt=3, step=step, seconds=0.2, bytes=58_000_000)
    event(run, "attempt_ended", 115.0, attempt=3, outcome="finished", message="", last_step=60)
    event(run, "stage_finished", 115.2, stage="train", seconds=84.0)
    write_metrics(run, 1, range(1, 28), 40.0)
    write_metrics(run, 3, range(21, 61), 78.0)


def write_finished(run: RunDir) -> None:
    write_recipe(run)
    write_corpus(run)
    event(run, "stage_started", 0, stage="corpus")
    event(run, "stage_finished", 31, stage="corpus", seconds=31.0)
    write_training(run)
    event(run, "stage_started", 115.3, stage="export")
    event(run, "exported", 117, step=60)
    event(run, "stage_finished", 118, stage="export", seconds=2.7)
    event(run, "stage_started", 118, stage="evaluate")
    event(run, "stage_finished", 127, stage="evaluate", seconds=9.0)
    for day in (86_400, 172_800):  # the same command again finds nothing to do
        event(run, "stage_started", day, stage="corpus")
        event(run, "stage_finished", day + 1, stage="corpus", seconds=1.0, skipped=True)
    base, model = {"loss": 9.02, "perplexity": 8266.8}, {"loss": 4.31, "perplexity": 74.4}
    run.write_json(run.evaluation(60), {"step": 60, "base": base, "model": model, "sequences": 96, "tokens": 12_288})
    completions = [
        "a list of the\n  keys | values `x`",
        f"<b>bold</b> {EVIL} \ud800",
        "</td></table><img src=x onerror=alert(1)>",
    ]
    answers = [
        {"prompt": prompt, "completion": completion, "tokens": 32, "seconds": 0.41}
        for prompt, completion in zip(("The method returns", "Raises <", "def main"), completions, strict=True)
    ]
    run.write_json(run.answers, {"answers": answers})


def pages(run: RunDir) -> tuple[str, str]:
    """report.html and report.md, freshly written."""
    assert write_report(run) == run.report_html
    return storage.read(run.report_html).decode(), storage.read(run.report_markdown).decode()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(str(tmp_path / "tiny"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(str(tmp_path_factory.mktemp("runs") / "tiny"))
    write_finished(run)
    return run


@pytest.fixture(scope="module")
def finished_pages(finished: RunDir) -> tuple[str, str]:
    return pages(finished)


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


# --- attempt rows -----------------------------------------------------------------------------------------------------


def test_rows_tell_steps_outcome_repeats_and_recovery(finished: RunDir) -> None:
    first, second, third = attempt_rows(finished.events(), finished.metric_lines())
    assert (first.workers, first.layout, first.first_step, first.last_step) == (4, "ZeRO-2", 1, 27)
    assert (first.outcome, first.failed, first.steps_repeated, first.recovery_s) == ("worker_lost", True, 0, None)
    assert (second.first_step, second.last_step, second.outcome, second.steps_repeated) == (
        None,
        None,
        "out_of_memory",
        0,
    )
    assert (third.first_step, third.last_step, third.outcome, third.failed) == (21, 60, "finished", False)
    assert third.steps_repeated == 7


def test_recovery_runs_from_the_fault_over_attempts_without_a_step(finished: RunDir) -> None:
    rows = attempt_rows(finished.events(), finished.metric_lines())
    assert [row.recovery_s for row in rows] == [None, None, 78.0 - 64.5]


def test_recovery_starts_at_the_end_of_the_attempt_when_no_fault_was_injected() -> None:
    events: list[dict[str, Any]] = [
        {"event": "attempt_ended", "time": 10.0, "attempt": 1, "outcome": "node_lost"},
        {"event": "first_step", "time": 14.5, "attempt": 2, "step": 1},
    ]
    assert [row.recovery_s for row in attempt_rows(events, [])] == [None, 4.5]


def test_recovery_ends_with_the_step_and_not_with_the_news_of_it() -> None:
    events: list[dict[str, Any]] = [
        {"event": "attempt_ended", "time": 10.0, "attempt": 1, "outcome": "node_lost"},
        {"event": "first_step", "time": 19.0, "attempt": 2, "step": 1},
    ]
    metrics = [{"attempt": 2, "step": 1, "time": 14.0}, {"attempt": 2, "step": 2, "time": 15.0}]
    assert attempt_rows(events, metrics)[1].recovery_s == 4.0


def test_time_until_a_new_command_is_not_recovery() -> None:
    events: list[dict[str, Any]] = [
        {"event": "attempt_ended", "time": 10.0, "attempt": 1, "outcome": "error"},
        {"event": "stage_started", "time": 90_000.0, "stage": "train"},
        {"event": "first_step", "time": 90_008.0, "attempt": 2, "step": 1},
    ]
    assert attempt_rows(events, [])[1].recovery_s is None


@pytest.mark.parametrize("outcome", ["finished", "stopped"])
def test_attempt_that_ended_well_leaves_nothing_to_recover(outcome: str) -> None:
    events: list[dict[str, Any]] = [
        {"event": "fault_injected", "time": 5.0},
        {"event": "attempt_ended", "time": 10.0, "attempt": 1, "outcome": outcome},
        {"event": "first_step", "time": 12.0, "attempt": 2, "step": 1},
    ]
    first, second = attempt_rows(events, [])
    assert not first.failed
    assert second.recovery_s is None


def test_steps_are_counted_as_repeated_against_the_furthest_earlier_attempt() -> None:
    covered = {1: range(1, 18), 2: range(11, 13), 3: range(11, 61)}
    lines = [{"attempt": attempt, "step": step} for attempt, steps in covered.items() for step in steps]
    assert [row.steps_repeated for row in attempt_rows([], lines)] == [0, 2, 7]


def test_rows_of_nothing_and_of_bare_events() -> None:
    assert attempt_rows([], []) == []
    (row,) = attempt_rows([{"event": "planned", "attempt": 1, "plan": {"data_parallel": 4, "pipeline_stages": 2}}], [])
    assert (row.workers, row.layout, row.first_step, row.outcome, row.failed) == (8, None, None, None, False)


def test_planned_resize_says_how_long_no_step_was_made() -> None:
    events: list[dict[str, Any]] = [{"event": "attempt_ended", "time": 10.0, "attempt": 1, "outcome": "yielded"}]
    lines = [{"attempt": number, "step": step, "time": time} for number, step, time in ((1, 1, 8.0), (2, 2, 12.5))]
    first, second = attempt_rows(events, lines)
    assert (first.failed, second.resize_s, second.recovery_s) == (False, 4.5, None)


def test_recovery_starts_at_the_failure_where_it_is_known() -> None:
    events: list[dict[str, Any]] = [
        {"event": "fault_injected", "time": 5.0, "kind": "slow_rank"},
        {"event": "attempt_ended", "time": 10.0, "attempt": 1, "outcome": "worker_lost", "failed_at": 8.5},
        {"event": "first_step", "time": 14.5, "attempt": 2, "step": 1},
    ]
    assert attempt_rows(events, [{"attempt": 1, "step": 1, "time": 8.0, "step_time_s": 1.0}])[1].recovery_s == 6.0
    assert attempt_rows(events, [])[1].recovery_s == 9.5, "the fault, where no step came after it"


# --- report -----------------------------------------------------------------------------------------------------------


def test_report_of_a_finished_run_tells_the_outcome_in_one_line(finished_pages: tuple[str, str]) -> None:
    outcome = "Training finished: 60 of 60 steps; loss 8.78"
    page, markdown = finished_pages
    assert outcome in page
    assert outcome in markdown
    for text in ("failures survived: 2, steps repeated: 7", "held-out perplexity 8,267 → 74.4"):
        assert text in page
        assert text in markdown


def test_report_of_a_finished_run_holds_every_number_that_was_asked_for(finished_pages: tuple[str, str]) -> None:
    for page in finished_pages:
        for text in ("4,900,000", "1,167,360", "0.0003", "1,480", "1,312", "too short", "4,210,337", "1–27", "21–60"):
            assert text in page
        for text in (
            "out of memory",
            "13.5 s",
            "8 × 4",
            "-99.1 %",
            "1 min 24 s",
            "66 %",
            "4 CPUs are free",
            "1 to 4",
            "fp32",
        ):
            assert text in page


def test_plots_are_inline_and_only_in_the_page(finished_pages: tuple[str, str]) -> None:
    page, markdown = finished_pages
    assert page.count("<svg") == page.count("</svg>") == 5
    assert "<svg" not in markdown
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)


def test_page_holds_no_script_and_loads_nothing(finished_pages: tuple[str, str]) -> None:
    page, markdown = finished_pages
    elements = Elements(page)
    assert not elements.names & {"script", "img", "b", "iframe", "link", "object"}
    assert not [name for name, _ in elements.attributes if name.startswith("on") or name == "src"]
    assert all(value.startswith("#") for name, value in elements.attributes if name.endswith("href"))
    assert html.escape(EVIL) in page
    assert set(re.findall(r"<[^>]*>", markdown)) == {"<br>"}


def test_completions_stay_inside_their_markdown_cell(finished_pages: tuple[str, str]) -> None:
    _, markdown = finished_pages
    assert r"| The method returns | a list of the<br>  keys \| values \`x\` | 32 | 0.41 |" in markdown


def test_report_of_an_empty_directory_says_what_is_missing(run: RunDir) -> None:
    for page in pages(run):
        for text in (
            "Training has not begun",
            "No corpus yet",
            "No training step yet",
            "No attempt yet",
            "Not evaluated yet",
            "has not been asked",
        ):
            assert text in page


def test_report_of_a_run_that_is_training(run: RunDir) -> None:
    write_recipe(run)
    event(run, "stage_started", 0, stage="train")
    run.claim_attempt(plan(2, 2))
    event(run, "attempt_started", 1, attempt=1, workers=2, resume_step=0)
    write_metrics(run, 1, range(1, 6), 9.0)
    for page in pages(run):
        assert "Training is not finished: 5 of 60 steps" in page
        assert "no end recorded" in page
        assert "Not evaluated yet" in page


def test_spikes_and_the_held_out_loss_are_told(run: RunDir) -> None:
    write_recipe(run)
    spike = {"loss": 7.25, "loss_z": 31.4, "grad_norm": 2.5, "norm_z": 1.5, "documents": ["a/bad#7", "a/near#8"]}
    event(run, "spike", 5, attempt=1, step=23, action="skip", quarantined=[], **spike)
    event(run, "spike", 9, attempt=1, step=33, action="rollback", quarantined=["a/bad#7"], **spike)
    event(run, "rolled_back", 9, attempt=1, step=33, back_to=20, first=31, last=35, quarantined=["a/bad#7"])
    lines = [{"step": n, "time": BEGIN + n, "loss": 5.0, "held_out_loss": 5.5 if n % 2 else None} for n in range(1, 9)]
    storage.write(run.metrics(1), "".join(json.dumps(line) + "\n" for line in lines).encode())
    run.claim_attempt(plan(2, 2))
    page, markdown = pages(run)
    text = markdown.replace("\\", "")
    assert re.search(r"\| 23 \| 1 \| 7.25 \| 31.4 \| 2.5\d* \| 1.5\d* \| skip \| a/bad#7, a/near#8 \|", text), text
    assert "back to step 20; passed over: 31 to 35 | a/bad#7 (left out), a/near#8 |" in text
    assert ">held out<" in page


def test_report_stands_records_without_their_fields(run: RunDir) -> None:
    names = ["stage_started", "planned", "attempt_started", "first_step", "committed", "decided", "fault_injected"]
    for name in [*names, "spike", "rolled_back"]:
        event(run, name, 1)
        event(run, name, 2, attempt=1)
        run.write_json(run.path("events", f"{len(run.events()) + 1:06d}-x.json"), {"event": name, "attempt": 1})
    event(run, "attempt_ended", 3, attempt=1)
    run.write_json(run.resolved, {"recipe": {"name": "tiny"}})
    run.write_json(run.corpus_manifest, {"documents": {"read": 3}, "splits": {"train": {}}, "sources": {"a": {}}})
    run.write_json(run.evaluation(1), {"step": 1, "base": {}})
    run.write_json(run.answers, {"answers": [{}]})
    storage.write(run.metrics(1), b'{"step": 1}\n{"step": 2, "loss": NaN, "lr": null}\n{"loss": 1.0}\n')
    for page in pages(run):
        assert "Unaccounted for: 3" in page


def test_documents_that_do_not_add_up_are_named(run: RunDir) -> None:
    write_corpus(run)
    assert "Documents in = kept + dropped." in pages(run)[1]
    documents = {"read": 100, "kept": 70, "dropped": {"too_short": 18}}
    run.write_json(run.corpus_manifest, {"documents": documents})
    assert "Unaccounted for: 12 documents" in pages(run)[1]


def test_what_the_wall_time_of_training_went_into_is_told(finished_pages: tuple[str, str]) -> None:
    page, markdown = finished_pages
    assert "goodput 62.5 %" in page
    assert "| productive | 52.5 s | 62.5 % |" in markdown
    assert "| worker lost | 1 |" in markdown
    plot = page.partition("<h2>Goodput")[2].partition("</section>")[0]
    for kind in ("productive", "checkpoint", "lost work", "detection", "scheduling", "start-up"):
        assert f">{kind}<" in plot


def test_interrupted_stage_ends_with_its_last_sign_of_life(run: RunDir) -> None:
    event(run, "stage_started", 0, stage="train")
    event(run, "committed", 30, attempt=1, step=10)
    event(run, "stage_finished", 50_000, stage="corpus", seconds=0.1, skipped=True)
    event(run, "stage_started", 50_001, stage="train")
    event(run, "stage_finished", 50_011, stage="train", seconds=10.0)
    assert "| train | 40 s | 100 % |" in pages(run)[1]


def test_time_line_leaves_out_the_time_between_two_commands(finished_pages: tuple[str, str]) -> None:
    time_line = finished_pages[0].partition("Time line")[2].partition("</section>")[0]
    assert ">seconds<" in time_line
    assert ">120<" in time_line
    assert ">140<" not in time_line


def test_time_line_marks_what_happened_to_the_attempts(finished_pages: tuple[str, str]) -> None:
    time_line = finished_pages[0].partition("Time line")[2].partition("</section>")[0]
    for label in (
        "corpus",
        "train",
        "attempt 1",
        "attempt 3",
        "evaluate",
        "committed",
        "fault injected",
        "failed",
        "decided",
    ):
        assert f">{label}<" in time_line


def test_same_run_gives_the_same_report(finished: RunDir, finished_pages: tuple[str, str]) -> None:
    assert pages(finished) == finished_pages


def test_page_of_a_hundred_thousand_steps_stays_small(run: RunDir) -> None:
    lines = (f'{{"step": {step}, "loss": {3 + (step * 7919 % 1000) / 1000}}}\n' for step in range(100_000))
    storage.write(run.metrics(1), "".join(lines).encode())
    assert len(pages(run)[0]) < 1_500_000


def test_the_layout_of_each_attempt_is_told() -> None:
    plan = {"tensor_parallel": 2, "pipeline_stages": 2, "layers_per_stage": [1, 3], "zero_stage": 1, "dtype": "bf16"}
    plan |= {"offload": False, "recompute": True, "data_parallel": 1}
    (row,) = attempt_rows([{"event": "planned", "attempt": 1, "plan": plan}], [])
    assert (row.workers, row.layout) == (4, "ZeRO-1, tensor parallel 2, 2 stages of 1+3 layers, recompute, bf16")
