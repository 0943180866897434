"""`mega train`."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher import train_result
from launcher.errors import ConfigError, RankError
from launcher.local_ranks import run_local_ranks
from launcher.mpi_meeting import meet_and_leave, no_meeting
from launcher.output import Output
from launcher.place import Place, find_place, ranks_to_start
from launcher.rank_environment import adopt, is_rank
from launcher.rank_process import EXIT_STOPPED, failure_file, stop_before_first_step
from launcher.verb import ConfigFiles, NumRanks, Overrides
from launcher.verbs.simulate import SimulateRank, SimulateWorld, simulate
from megamodel.train.run_directory import RunDirectory

if TYPE_CHECKING:
    from launcher.config import RunConfig
    from launcher.finish import TrainedRun
    from megamodel.train.job import TrainingResult

# Beside the ranks' logs: the result that rank 0 hands to the process that started it.
_RESULT_NAME = "result.json"

DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would run; start nothing.")]
TraceCommunication = Annotated[
    bool,
    typer.Option(
        "--trace-communication", help="Count what the first two steps send, beside the formulas. Without torch.compile."
    ),
]


def train(
    out: Output,
    files: ConfigFiles,
    overrides: Overrides = None,
    ranks: NumRanks = None,
    dry_run: DryRun = False,
    trace_communication: TraceCommunication = False,
    simulate_world: SimulateWorld = None,
    simulate_rank: SimulateRank = None,
) -> int:
    """Train a run, or continue it: the same command does both. Ctrl-C, SIGTERM and SIGUSR1 save, then end with 75."""
    if simulate_world is not None or simulate_rank is not None:
        unused = {"--ranks": ranks, "--dry-run": dry_run, "--trace-communication": trace_communication}
        if given := [option for option, value in unused.items() if value]:
            raise ConfigError(
                f"--simulate-world starts nothing, so {', '.join(given)} means nothing beside it: leave it out"
            )
        return simulate(out, files, overrides, simulate_world, simulate_rank)
    if is_rank(os.environ):
        stop_before_first_step()
    adopt(os.environ, meet_over_mpi=no_meeting if dry_run else meet_and_leave)
    return run_training(out, files, overrides, ranks, dry_run, trace_communication=trace_communication)


def run_training(
    out: Output,
    files: ConfigFiles,
    overrides: Overrides = None,
    ranks: NumRanks = None,
    dry_run: bool = False,
    *,
    summary: bool = True,
    trace_communication: bool = False,
) -> int:
    """The verb; without `summary` it does not say at the end where everything is."""
    from launcher.config import load_run_config
    from launcher.needed_packages import check_packages
    from launcher.run_lock import locked_run
    from launcher.run_record import changes_to_run

    place = find_place(os.environ, ranks)
    loaded = load_run_config(files, overrides or (), num_ranks=place.num_ranks)
    num_ranks = place.num_ranks
    if not place.joins and num_ranks > 1:
        num_ranks = ranks_to_start(num_ranks, device=loaded.config.run.device, environ=os.environ, say=out.warn)
        if num_ranks != place.num_ranks:
            loaded = load_run_config(files, overrides or (), num_ranks=num_ranks)
    check_packages(loaded.config)
    if dry_run:
        return _say_plan(out, loaded.config, num_ranks) if place.rank == 0 else 0
    with contextlib.ExitStack() as held:
        if place.rank == 0 and not place.child_of_mega:
            held.enter_context(locked_run(loaded.config.run_directory, say=out.warn))
            for change in changes_to_run(loaded):
                out.say(f"changed since the last start: {change}")
        if place.joins or num_ranks == 1:
            try:
                return _train_here(out, loaded.config, place, summary=summary, trace_communication=trace_communication)
            except SystemExit:  # stopped by a signal where nothing is left to save
                if place.rank == 0 and not place.child_of_mega:
                    out.result(train_result.stopped_before_result(loaded.config.run_directory))
                raise
        options = ["--trace-communication"] if trace_communication else []
        return _train_in_children(out, loaded.config, files, overrides or (), num_ranks, options)


def _train_in_children(
    out: Output,
    config: RunConfig,
    files: list[Path],
    overrides: list[str] | tuple[str, ...],
    num_ranks: int,
    options: list[str],
) -> int:
    from cluster.hardware import num_usable_cores
    from launcher.run_record import new_attempt

    attempt = new_attempt(RunDirectory(config.run_directory))
    sets = [argument for override in overrides for argument in ("--set", override)]
    flags = [*options, *(["--json"] if out.as_json else [])]
    out.say(f"{num_ranks} ranks on this machine; the logs of ranks 1 and up: {attempt}")
    code = run_local_ranks(
        ["train", *map(str, files), *sets, "--ranks", str(num_ranks), *flags],
        num_ranks=num_ranks,
        log_directory=attempt,
        environ=os.environ,
        num_cores=num_usable_cores(),
        say=out.warn,
    )
    # Told here, once every rank has ended well: rank 0 alone cannot know.
    result = attempt / _RESULT_NAME
    if code == 0 and not result.exists():
        raise RankError("rank 0 ended before the run was done, with exit code 0; the same command continues")
    if result.exists():
        out.result(json.loads(result.read_text(encoding="utf-8")))
    else:
        out.result(train_result.stopped_before_result(config.run_directory))
    return code


def _train_here(out: Output, config: RunConfig, place: Place, *, summary: bool, trace_communication: bool) -> int:
    """One rank: trains together with the others, then rank 0 alone exports and samples."""
    stop_before_first_step()
    # torch reads this once, when it is imported; what it warns of (such as a switch that DDP is given on purpose) is no
    # business of a user's terminal.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from rich.console import Console

    from launcher.rank_preflight import preflighted
    from launcher.run_record import record_begin, record_config
    from megamodel.train.run import train as train_run

    speaks = place.rank == 0 or place.child_of_mega  # other ranks of `mega --ranks` have a log of their own
    console = Console(file=out.people, quiet=not speaks)
    job = config.training_job.traced() if trace_communication else config.training_job

    def accepted() -> None:
        record_config(config)
        record_begin(RunDirectory(config.run_directory), num_ranks=place.num_ranks, environ=os.environ)

    with preflighted(os.environ, config, say=out.say):
        result = train_run(job, console=console, on_accepted=accepted)
    if place.rank == 0:
        export_path = _finish(out, config) if result.finished else None
        if result.finished and result.trained:
            RunDirectory(config.run_directory).append_event("finished", step=result.steps)
        if result.finished and summary:
            _say_summary(out, result, export_path, place)
        answer = train_result.ended(result, export_path)
        if failures := failure_file(os.environ):
            with failures.with_name(_RESULT_NAME).open("w", encoding="utf-8") as file:
                Output(as_json=True, out=file).result(answer)
        else:
            out.result(answer)
    return 0 if result.finished else EXIT_STOPPED


def _finish(out: Output, config: RunConfig) -> Path | None:
    """Exports, then samples, as far as no earlier start has done so with the newest checkpoint; returns the export's folder."""
    from launcher.finish import export, newest_is_exported, newest_is_sampled, open_trained

    directory = RunDirectory(config.run_directory)
    path = None if config.export.format == "none" else directory.export / "hf"
    export_is_due = path is not None and not newest_is_exported(directory, config.export)
    # A stop between the two leaves an export without a sample.
    if not export_is_due and newest_is_sampled(directory):
        return path
    run = open_trained(directory, config)
    if export_is_due:
        out.say("\nexporting, and checking the export with transformers ...")
        path = export(run, config.export).path
    _say_samples(out, run)
    return path


def _say_samples(out: Output, run: TrainedRun) -> None:
    """A taste of the model. What goes wrong here, such as a stop token that the tokenizer lacks, fails no run."""
    from launcher.finish import sample

    try:
        texts = sample(run, run.config.generate)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        out.warn(
            f"no text was sampled: {reason}; `mega generate {run.directory.root}` takes other prompts and settings"
        )
        return
    for text in texts:
        out.say(f"\n--- sample, prompt {text.prompt!r}\n{text.prompt}{text.text}")
        run.directory.append_event("sample", step=run.restored.step, prompt=text.prompt, text=text.text)


def _say_summary(out: Output, result: TrainingResult, export_path: Path | None, place: Place) -> None:
    root = result.run_directory
    if result.trained:
        out.say(f"\nFinished: {result.steps:,} steps, {result.tokens:,} tokens.")
    else:
        out.say(f"\nNothing to do: this run has finished its {result.steps:,} steps ({result.tokens:,} tokens).")
    if result.val_loss is not None and result.val_bits_per_byte is not None:
        out.say(f"Held-out text: {result.val_loss:.4f} nats a token, {result.val_bits_per_byte:.4f} bits per byte")
        for name, value in result.baselines.items():
            if name.endswith("_bits_per_byte"):
                out.say(f"  the same bytes with {name.removesuffix('_bits_per_byte')} -9: {value:.4f} bits per byte")
    places = {
        "configuration": root / "config.toml",
        "metrics": root / "metrics.jsonl",
        "checkpoints": root / "checkpoints",
        **({"export": export_path} if export_path else {}),
    }
    out.say("Where everything is:")
    for name, path in places.items():
        out.say(f"  {name:14} {path}")
    out.say("What to try next:")
    out.say(f'  mega generate {root} --prompt "def main("')
    out.say(f"  {_train_on(root, place, steps=2 * result.steps)}")
    out.say(f"  tensorboard --logdir {root / 'tensorboard'}")


def _train_on(root: Path, place: Place, *, steps: int) -> str:
    """The command by which this run was started, for more steps."""
    from launcher.jobs.agents.protocol import ATTEMPT

    words = f"{root / 'config.toml'} --set train.steps={steps}"
    if ATTEMPT not in os.environ:
        ranks = f" --ranks {place.num_ranks}" if place.child_of_mega else ""
        return f"mega train {words}{ranks}    # train on"
    from launcher.jobs.job_record import JobFolder

    record = JobFolder(RunDirectory(root), say=lambda text: None).read_record()
    on = "" if record is None else f" --on {record.backend}"
    # How hosts were named is nowhere written down.
    same = ", with the same hosts" if record is not None and record.backend in ("mpi", "torchrun") else ""
    return f"mega launch {words}{on}    # train on{same}"


def _say_plan(out: Output, config: RunConfig, num_ranks: int) -> int:
    from launcher.layout_summary import in_words, layout_summary

    directory = RunDirectory(config.run_directory)
    checkpoints = sorted(path.name for path in directory.checkpoints.glob("step-*"))
    tokens_per_step = config.train.global_batch_size * config.data.seq_len
    plan = {
        "run_dir": str(directory.root),
        "continues_from": checkpoints[-1] if checkpoints else None,
        "ranks": num_ranks,
        "steps": config.train.steps,
        "tokens_per_step": tokens_per_step,
        "tokens": tokens_per_step * config.train.steps,
    }
    summary = layout_summary(config, num_ranks)
    words = {key: str(value) for key, value in plan.items()} | in_words(summary)
    out.table(("what", "value"), [(key.replace("_", " "), value) for key, value in words.items()])
    out.say("Nothing was started (--dry-run).")
    out.result({**plan, **summary})
    return 0
