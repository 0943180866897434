"""A training run, from its configuration to its result. Reads like the summary of what happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from cluster.hardware import cpu_name, published_bf16_peak
from data_pipeline.dataset import PackedDataset
from data_pipeline.prepare import prepare
from data_pipeline.prepared import PreparedData, compression_baselines
from megamodel.errors import RefusedError
from megamodel.model.size import model_size, training_flops_per_token
from megamodel.train.activation_watch import ActivationWatch
from megamodel.train.assemble import assemble
from megamodel.train.callbacks.base import Callback, RunFacts
from megamodel.train.callbacks.communication import CommunicationTable
from megamodel.train.callbacks.fabric import FabricMonitor, watch_run
from megamodel.train.callbacks.progress import ProgressLine
from megamodel.train.callbacks.records import JsonlRecords, TensorBoardRecords
from megamodel.train.checkpointing import Progress, RunCheckpoints, identity
from megamodel.train.job import TrainingJob, TrainingResult
from megamodel.train.layout import layout_demands
from megamodel.train.run_directory import LostSteps, RunDirectory
from megamodel.train.step import Step, TrainStep
from megamodel.train.trace import CommunicationTrace, expectation
from megamodel.train.trainer import LoopResult, Trainer, TrainingData
from parallel.checkpoint.directory import CorruptCheckpoint
from parallel.checkpoint.store import CheckpointStore
from parallel.layout import resolve_layout
from parallel.layout_check import layout_problems
from parallel.mesh import Mesh
from parallel.world import World, open_world


def train(job: TrainingJob, *, console: Console, on_accepted: Callable[[], None] | None = None) -> TrainingResult:
    """Trains, or continues, the run of `job` to its end or to a stop signal. Every rank of the run calls it.

    `on_accepted` is called on rank 0 once nothing speaks against training any more: the ranks agree, the checkpoint to
    continue from, if there is one, is of this run, and there are steps left to do.

    Raises the user errors of the parts (`exit_code` says how the process should end).
    """
    # Before the ranks meet: reading a large corpus may take longer than ranks should wait in a collective.
    prepared = prepare(job.data, progress=lambda stage, share: _say_stage(console, stage, share))
    with open_world(
        device=job.device,
        timeout_seconds=job.parallel.timeout_seconds,
        rendezvous_timeout_seconds=job.parallel.rendezvous_timeout_seconds,
    ) as world:
        return train_in_world(job, prepared, world, console=console, on_accepted=on_accepted)


def train_in_world(
    job: TrainingJob,
    prepared: PreparedData,
    world: World,
    *,
    console: Console,
    callbacks: Sequence[Callback] = (),
    on_accepted: Callable[[], None] | None = None,
) -> TrainingResult:
    """`train` for ranks that have met already, with data that is prepared. A collective.

    `callbacks` watch the run on this rank, after those that every run has on its first rank.
    """
    _check_agreement(job, prepared, world)
    data = _open_data(job, prepared, world)
    directory = RunDirectory(job.run_directory)
    watchers = [*(_callbacks(job, directory, console) if world.is_main else []), *callbacks]
    with _closing(watchers):
        monitor = watch_run(
            job, world, console=console, scalars=[each.add for each in watchers if isinstance(each, TensorBoardRecords)]
        )
        if monitor is not None:
            watchers.insert(0, monitor)  # closed first: what it still shows needs the others
        return _train(job, prepared, data, world, directory, watchers, monitor, on_accepted or (lambda: None))


@contextmanager
def _closing(callbacks: list[Callback]) -> Iterator[None]:
    """Closes every one of the callbacks in the end, whichever of them raises. What has ended the run is never hidden by what
    a callback raises then: that becomes a note to it."""
    try:
        yield
    except BaseException as error:
        for problem in _close_each(callbacks):
            error.add_note(f"closing the run's records failed too: {problem!r}")
        raise
    if problems := _close_each(callbacks):
        raise problems[0]


def _close_each(callbacks: list[Callback]) -> list[Exception]:
    problems = []
    for callback in callbacks:
        try:
            callback.close()
        except Exception as problem:
            problems.append(problem)
    return problems


def _train(
    job: TrainingJob,
    prepared: PreparedData,
    data: TrainingData,
    world: World,
    directory: RunDirectory,
    callbacks: list[Callback],
    monitor: FabricMonitor | None,
    on_accepted: Callable[[], None],
) -> TrainingResult:
    _check_layout(job, world)
    with CheckpointStore(directory.checkpoints, world, keep_last=job.train.checkpoint.keep_last) as store:
        found = store.latest(on_corrupt=lambda corrupt: _tell_corrupt(callbacks, corrupt))
        assembled = assemble(
            job.model,
            job.train,
            job.parallel,
            mesh=Mesh(world, resolve_layout(job.parallel, world.world_size), host_tensors=job.parallel.cpu_offload),
            seed=job.seed if found is None else None,
            seq_len=job.data.seq_len,
        )
        built, optimizers = assembled.built, assembled.optimizers
        store.overlap_with(optimizers.members)
        checkpoints = RunCheckpoints(
            store=store,
            world=world,
            built=built,
            optimizers=optimizers,
            job=job,
            manifest_hash=prepared.manifest_hash,
        )
        progress = Progress() if found is None else checkpoints.restore(found)
        if progress.step >= job.train.steps:
            return _result(job, prepared, directory, LoopResult.already_finished(progress))
        if world.is_main:
            on_accepted()
            directory.keep_tokenizer(prepared.tokenizer_path)
            _tell_lost(callbacks, directory.forget_metrics_after(progress.step))
        _tell_start(callbacks, progress, built.notice)
        step = TrainStep(built, optimizers, max_norm=job.train.clip_grad_norm)
        first_step = progress.step + 1
        trace = CommunicationTrace(job, step, callbacks, first_step=first_step) if job.trace_communication else None
        trainer = Trainer(
            world=world,
            config=job.train,
            built=built,
            step=_watched(job, step, trace, callbacks, monitor, store, first_step),
            data=data,
            checkpoints=checkpoints,
            callbacks=callbacks,
            facts=_facts(job, world, progress),
            progress=progress,
        )
        try:
            ended = trainer.run()
        finally:
            built.data_parallel.close()
    _tell_end(callbacks, ended)
    result = _result(job, prepared, directory, ended)
    return replace(result, communication=tuple(trace.told)) if trace else result


def _watched(
    job: TrainingJob,
    step: TrainStep,
    trace: CommunicationTrace | None,
    callbacks: list[Callback],
    monitor: FabricMonitor | None,
    store: CheckpointStore,
    first_step: int,
) -> Step:
    """The step, with all that stands around it: the trace, or what says in its second call what the mode of activation
    memory saves, if there is one; and the monitor."""
    inner: Step = trace or step
    if trace is None and job.train.activation_memory.mode != "none":
        inner = ActivationWatch(job, step, callbacks, first_step=first_step)
    if monitor is None:
        return inner
    return monitor.around(
        inner,
        step.built,
        expected=lambda: expectation(job, step.built),
        is_saving=lambda: store.is_saving,
        first_step=first_step,
    )


def _open_data(job: TrainingJob, prepared: PreparedData, world: World) -> TrainingData:
    if prepared.manifest.vocab_size > job.model.vocab_size:
        raise RefusedError(
            f"{prepared.tokenizer_path} has {prepared.manifest.vocab_size} tokens, and model.vocab_size is "
            f"{job.model.vocab_size}: set model.vocab_size to at least {prepared.manifest.vocab_size}"
        )
    bytes_of_token_V = torch.zeros(job.model.vocab_size, dtype=torch.int64)
    bytes_of_token_V[: len(prepared.token_bytes)] = torch.from_numpy(prepared.token_bytes).long()
    held_out = "held_out" in prepared.manifest.splits and prepared.manifest.splits["held_out"].num_tokens > 0
    return TrainingData(
        train=PackedDataset(prepared, "train", job.data.seq_len),
        held_out=PackedDataset(prepared, "held_out", job.data.seq_len) if held_out else None,
        bytes_of_token_V=bytes_of_token_V.to(world.device),
        document_mask=job.data.document_mask,
        seed=job.seed,
    )


def _check_agreement(job: TrainingJob, prepared: PreparedData, world: World) -> None:
    """Ranks with another configuration or other data would train on, in step and wrong."""
    mine = identity(job, prepared.manifest_hash)
    for section, config in (("train", job.train), ("parallel", job.parallel), ("fabric", job.fabric)):
        mine |= {f"{section}.{key}": value for key, value in config.model_dump(mode="json").items()}
    everyone = world.all_gather_object(mine)
    problems = [
        f"{key} is {values[key]!r} on rank {rank} and {everyone[0].get(key)!r} on rank 0"
        for rank, values in enumerate(everyone)
        for key in values
        if values[key] != everyone[0].get(key)
    ]
    if problems:
        raise RefusedError(
            f"the ranks do not train the same: {'; '.join(problems[:5])}. Start all with one configuration, on hosts with "
            "equal data"
        )


def _check_layout(job: TrainingJob, world: World) -> None:
    """The command line has asked this before; a program that starts training itself has not."""
    demands = layout_demands(job.model, job.train, seq_len=job.data.seq_len, device=job.device)
    if problems := layout_problems(job.parallel, demands, world.world_size):
        raise RefusedError("; ".join(problem.message for problem in problems))


def _callbacks(job: TrainingJob, directory: RunDirectory, console: Console) -> list[Callback]:
    callbacks: list[Callback] = [
        ProgressLine(console, every_steps=job.train.log.every_steps),
        JsonlRecords(directory),
        CommunicationTable(console),
    ]
    if job.train.log.tensorboard:
        callbacks.append(TensorBoardRecords(directory))
    return callbacks


def _facts(job: TrainingJob, world: World, progress: Progress) -> RunFacts:
    size = model_size(job.model)
    on_cuda = world.device.type == "cuda"
    device_name = torch.cuda.get_device_name(world.device) if on_cuda else cpu_name()
    peak = published_bf16_peak(device_name) if on_cuda and job.train.precision == "bf16" else None
    source = f"{peak / 1e12:,.0f} TFLOP/s, the published dense bf16 peak of {device_name}" if peak else None
    return RunFacts(
        total_steps=job.train.steps,
        first_step=progress.step + 1,
        num_parameters=size.total,
        num_active_parameters=size.active,
        flops_per_token=training_flops_per_token(job.model, job.data.seq_len),
        peak_flops=peak * world.world_size if peak else None,
        peak_source=f"{source}, times {world.world_size} rank(s)" if source else None,
        world_size=world.world_size,
        device_name=device_name,
    )


def _tell_start(callbacks: list[Callback], progress: Progress, notice: str | None) -> None:
    for callback in callbacks:
        if progress.step:
            callback.on_event("resume", step=progress.step, message=f"continuing after step {progress.step}")
        else:
            callback.on_event("start", step=0)
        if notice is not None:
            callback.on_event("notice", message=notice)


def _tell_lost(callbacks: list[Callback], lost: LostSteps | None) -> None:
    if lost is None:
        return
    message = (
        f"{lost.lost_steps} step(s) after step {lost.to_step} had been made and not saved; they are made again "
        f"({lost.lost_seconds:.1f} s)"
    )
    for callback in callbacks:
        callback.on_event("rollback", **asdict(lost), message=message)


def _tell_corrupt(callbacks: list[Callback], corrupt: CorruptCheckpoint) -> None:
    message = (
        f"the checkpoint of step {corrupt.step} is corrupt ({'; '.join(corrupt.problems)}); set aside as {corrupt.path}"
    )
    for callback in callbacks:
        callback.on_event("corrupt_checkpoint", step=corrupt.step, message=message)


def _tell_end(callbacks: list[Callback], ended: LoopResult) -> None:
    for callback in callbacks:
        if ended.stopped_by is None:
            callback.on_event("end", step=ended.progress.step)
        else:
            message = (
                f"stopped by {ended.stopped_by} after step {ended.progress.step}; saved. The same command continues"
            )
            callback.on_event("stop", step=ended.progress.step, signal=ended.stopped_by, message=message)


def _result(job: TrainingJob, prepared: PreparedData, directory: RunDirectory, ended: LoopResult) -> TrainingResult:
    """What the loop found; what an earlier start found where this one had nothing left to do."""
    final_loss = ended.final_loss
    val_loss = ended.validation.loss if ended.validation else None
    val_bits_per_byte = ended.validation.bits_per_byte if ended.validation else None
    if ended.final_loss is None:
        for line in directory.read_metrics():
            final_loss = line.get("loss", final_loss)
            val_loss = line.get("val_loss", val_loss)
            val_bits_per_byte = line.get("val_bits_per_byte", val_bits_per_byte)
    return TrainingResult(
        run_directory=Path(job.run_directory),
        steps=ended.progress.step,
        finished=ended.progress.step >= job.train.steps,
        trained=ended.final_loss is not None,
        final_loss=final_loss,
        val_loss=val_loss,
        val_bits_per_byte=val_bits_per_byte,
        tokens=ended.progress.tokens,
        tokens_per_s=ended.tokens_per_s,
        baselines=compression_baselines(prepared),
    )


def _say_stage(console: Console, stage: str, share: float) -> None:
    """Stages as they begin; shares in between would only scroll by."""
    if share == 0.0:
        console.print(f"data: {stage}", highlight=False, markup=False)
