"""The command line: one short function per verb, which parses, calls and prints.

Heavy imports happen where they are used, so that `terrane --help` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli_arguments import Address, AsJson, Overrides, RecipePath, RunPath
from orchestrator.cli_plan import plan
from orchestrator.cli_simulate import simulate
from orchestrator.errors import Interrupted, StorageError, UserError

if TYPE_CHECKING:
    from orchestrator.runs import RunDir

app = typer.Typer(
    name="terrane",
    help="Adapt an open language model to a scientific corpus on whatever Ray cluster is at hand, and serve it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the `terrane` command."""
    raise SystemExit(guarded(app))


def guarded(call: Callable[[], Any]) -> int:
    """Run a command; errors that a user can act on become a message and an exit code, the rest keep their traceback."""
    try:
        try:
            call()
        except SystemExit as end:  # Typer: 0 done, 2 for wrong usage, which it has explained, 130 for Ctrl-C
            if end.code == Interrupted.exit_code:
                raise KeyboardInterrupt from None
            return end.code if isinstance(end.code, int) else 1
        return 0
    except UserError as error:
        if os.environ.get("TERRANE_DEBUG"):
            traceback.print_exc()
        print_error(error)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        place = f" {error.filename}" if error.filename else ""
        hint = "make it writable" if error.errno == errno.EROFS else "make room"
        print_error(
            StorageError(f"cannot write{place}: {os.strerror(error.errno)}", f"{hint}; the same command goes on")
        )
        return StorageError.exit_code
    except KeyboardInterrupt:
        print_error(Interrupted("interrupted; finished work is kept", "run the same command to go on"))
        return 130


def print_error(error: UserError) -> None:
    """`error:` with the value and the place, `hint:` with the next step."""
    typer.echo(f"{'stopped' if isinstance(error, Interrupted) else 'error'}: {error.message}", err=True)
    if error.hint:
        typer.echo(f"hint: {error.hint}", err=True)


def run_job(stages: tuple[str, ...], arguments: list[str]) -> int:
    """What `python -m jobs.NAME RECIPE [key=value ...]` does: the stages, on the cluster that the job runs in."""

    def call() -> None:
        if not arguments or arguments[0].startswith("-"):
            raise UserError("no recipe given", "python -m jobs.NAME RECIPE [key=value ...]")
        _run(arguments[0], arguments[1:], stages, os.environ.get("RAY_ADDRESS", "auto"))

    return guarded(call)


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="only this stage")] = None,
    address: Address = None,
    start_over: Annotated[
        bool, typer.Option("--start-over", help="set aside what the run has trained, and begin at step 1")
    ] = False,
) -> None:
    """Corpus, training, export, evaluation, a served answer, report. The same command goes on where it stopped."""
    from orchestrator.stages import STAGES

    if stage is not None and stage not in STAGES:
        raise UserError(f"--stage {stage} is no stage", f"one of {', '.join(STAGES)}")
    _run(recipe, overrides or [], (stage,) if stage else STAGES, address, start_over)


def _run(
    recipe: str, overrides: list[str], stages: tuple[str, ...], address: str | None, start_over: bool = False
) -> None:
    from orchestrator.config import load_recipe
    from orchestrator.console import set_up_logging
    from orchestrator.stages import run_recipe

    set_up_logging()
    loaded = load_recipe(recipe, overrides)
    source = Path(recipe).read_text(encoding="utf-8")
    run = run_recipe(loaded, source=source, stages=stages, address=address, start_over=start_over)
    typer.echo(_next_commands(run))


def _next_commands(run: RunDir) -> str:
    from orchestrator import storage

    place = _shortest(run.uri)
    lines = [f"done: {place}", f"  look      terrane status {place}"]
    if storage.exists(run.corpus_manifest) and not storage.exists(run.model_manifest):
        lines.append(f"  corpus    terrane corpus {place}")
    if storage.exists(run.report_html):
        lines.append(f"  read      {place}/report.html")
    if storage.exists(run.model_manifest):
        lines += [f"  serve     terrane serve {place}/model", "  talk      terrane chat http://127.0.0.1:8000"]
    return "\n".join(lines)


def _shortest(uri: str) -> str:
    """Relative to the working directory where that is shorter."""
    if "://" in uri:
        return uri
    relative = os.path.relpath(uri)
    return relative if len(relative) < len(uri) else uri


app.command()(plan)
app.command()(simulate)


@app.command()
def status(run: RunPath, as_json: AsJson = False) -> None:
    """Where a run is: stages, attempts, the last step and the newest checkpoint."""
    from orchestrator.runs import find_run
    from orchestrator.status import describe, finite, summarize

    summary = summarize(find_run(run))
    typer.echo(json.dumps(finite(summary), indent=2) if as_json else describe(summary))


@app.command()
def logs(
    run: RunPath,
    attempt: Annotated[int | None, typer.Option(help="default: the last")] = None,
    rank: Annotated[int | None, typer.Option(help="default: all")] = None,
    as_json: AsJson = False,
) -> None:
    """What the workers of an attempt logged, with the tracebacks they ended with."""
    from orchestrator.runs import find_run
    from orchestrator.status import worker_logs

    found = worker_logs(find_run(run), attempt, rank)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, text in found.items():
        typer.echo(f"==> {name} <==\n{text}")


@app.command()
def stop(run: RunPath) -> None:
    """Ask a run to commit after the step it is in, and end. `terrane run` goes on from there."""
    from orchestrator.runs import find_run
    from orchestrator.stop_requests import request_stop

    request_stop(find_run(run), "terrane stop")
    typer.echo("asked; the workers commit after the step they are in")


@app.command()
def corpus(
    place: Annotated[str, typer.Argument(metavar="RUN_OR_DIR", help="a run, or a corpus directory")],
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="STEP[:RANK[:SLOT]]|SAMPLE", help="name the documents of a run's step, or of a corpus's sample"
        ),
    ] = None,
    suspects: Annotated[
        int | None,
        typer.Option(metavar="STEP", help="judge the documents behind a loss spike with the checkpoint before it"),
    ] = None,
    dropped: Annotated[
        str | None, typer.Option(help="list documents that were dropped for this reason, or all")
    ] = None,
    limit: Annotated[int, typer.Option(help="of the documents listed")] = 100,
    as_json: AsJson = False,
) -> None:
    """What a corpus holds: documents, tokens, what was dropped and why, lengths, duplicates."""
    from orchestrator import corpora

    found = corpora.find_corpus(place)
    if trace is not None:
        passages = corpora.trace(found, trace)
        lines = [corpora.passage_line(passage) for passage in passages]
        rows: Any = passages
    elif suspects is not None:
        judged = corpora.suspects(found, suspects)
        lines = [f"judged with the checkpoint of step {judged['checkpoint']}"]
        lines += [f"z {d['z']:7.1f}  loss {d['loss']:7.3f}  {d['document']}" for d in judged["documents"]]
        rows = judged
    elif dropped is not None:
        documents = corpora.dropped(found, dropped, limit)
        lines = [f"{d.reason:24}  {d.id}{f'  = {d.of}' if d.of else ''}" for d in documents]
        lines += [f"... the first {limit}; --limit shows more"] if len(documents) == limit else []
        rows = [vars(d) for d in documents]
    else:
        rows = corpora.summarize(found)
        lines = [] if as_json else [corpora.describe(rows)]
    typer.echo(json.dumps(rows, indent=2) if as_json else "\n".join(lines))


@app.command()
def report(run: RunPath) -> None:
    """Write report.html and report.md from what the run has so far."""
    from orchestrator.report import write_report
    from orchestrator.runs import find_run

    typer.echo(write_report(find_run(run)))


@app.command()
def export(
    run: RunPath,
    step: Annotated[int | None, typer.Option(help="of the checkpoint; default: the newest")] = None,
    out: Annotated[
        str | None,
        typer.Option(help="directory or s3:// URI; default: RUN/model, or model-step-N"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: that of the training")] = None,
) -> None:
    """A checkpoint as a Hugging Face model directory."""
    from orchestrator.console import set_up_logging
    from orchestrator.runs import find_run
    from orchestrator.storage import absolute
    from orchestrator.train.export import export_step

    if dtype not in (None, "fp32", "bf16", "fp16"):
        raise UserError(f"--dtype {dtype} is no dtype of a model", "fp32, bf16 or fp16")
    set_up_logging()
    found = find_run(run)
    last = step is None or step >= found.recipe().train.steps
    target = absolute(out) if out else found.model if last else found.path(f"model-step-{step:08d}")
    typer.echo(f"step {export_step(found, step, target, dtype)} exported to {_shortest(target)}")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face directory, local or s3://")],
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    max_replicas: Annotated[int, typer.Option(help="replicas grow to this under load")] = 1,
    cpus_per_replica: Annotated[float, typer.Option()] = 1.0,
    gpus_per_replica: Annotated[float, typer.Option()] = 0.0,
    address: Address = None,
) -> None:
    """Serve a model with an OpenAI-compatible API until Ctrl-C."""
    from serve.local import serve_until_interrupted

    args = {
        "model": model,
        "max_replicas": max_replicas,
        "cpus_per_replica": cpus_per_replica,
        "gpus_per_replica": gpus_per_replica,
    }
    serve_until_interrupted(args, host=host, port=port, address=address, say=typer.echo)


@app.command()
def chat(
    target: Annotated[str, typer.Argument(metavar="MODEL_OR_URL", help="a running service's URL, or a model to serve")],
) -> None:
    """Talk to a model in the terminal. A base model completes what you type."""
    from serve.local import chat_with

    chat_with(target, say=typer.echo)


@app.command()
def doctor(
    as_json: AsJson = False,
    address: Address = None,
    preflight: Annotated[
        bool, typer.Option(help="Measure this machine's first device, and test its arithmetic.")
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="FILE.toml", help="Measure this machine's first device for plans; write a platform file."),
    ] = None,
) -> None:
    """What this machine, or the cluster at --address, can run, with what to fix."""
    if calibrate is not None:
        from orchestrator.calibration import calibrate as measure

        found = measure(calibrate)
        name = f"{found.name}: {len(found.flops_by_size)} dtypes, {found.memory_bytes_per_s / 1e9:,.0f} GB/s of memory"
        values, file = json.dumps({"file": calibrate, "name": found.name}), Path(calibrate).absolute()
        typer.echo(values if as_json else f"{name} -> {file}; name it in a cluster file: device: {file}")
        return
    from orchestrator.doctor import examine, measured

    checks = [*examine(address), *(measured() if preflight else [])]
    if as_json:
        typer.echo(json.dumps([vars(check) for check in checks], indent=2))
    else:
        for check in checks:
            typer.echo(f"{'ok ' if check.ok else 'FIX'}  {check.name}: {check.found}")
            if not check.ok:
                typer.echo(f"     {check.fix}")
    sys.exit(0 if all(check.ok for check in checks) else 1)
