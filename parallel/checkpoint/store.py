"""Saves and loads sharded checkpoints of any state, on any number of ranks: torch.distributed.checkpoint's bytes in a
`CheckpointDirectory`.

An asynchronous save copies each rank's share into CPU memory; a thread then writes, reads the files back to hash them,
and commits, talking to the other ranks over a process group of its own. What only an optimizer changes is copied by
that thread too, during the next forward and backward: `CheckpointStore.overlap_with`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.optim import Optimizer

from parallel.checkpoint import transfer
from parallel.checkpoint.agreement import on_every_rank, on_main
from parallel.checkpoint.directory import (
    CheckpointDirectory,
    CheckpointInfo,
    CorruptCheckpoint,
    FileRecord,
    find_problems,
    record_file,
)
from parallel.checkpoint.fit import SavedTensor, differences, some_of
from parallel.checkpoint.pieces import FlatState, flatten, in_pieces, nested_like
from parallel.checkpoint.shares import WriteShares
from parallel.checkpoint.staging import Moment, StagingBuffers, changed_only_by, moment_of
from parallel.errors import CheckpointError, CorruptCheckpointError
from parallel.placement import Piece
from parallel.world import World

_log = logging.getLogger(__name__)
_GRACE_SECONDS = 30.0
PER_RANK = "per_rank."
"""Entries below `per_rank` belong to one rank (its random state, say): see `CheckpointStore.load`."""


@dataclass(frozen=True, kw_only=True)
class LoadedState:
    """`state` has the nesting of what was asked for: the same tensors, now filled, and the loaded objects. `missing`
    names the `per_rank` entries that the checkpoint lacks; they keep the values that they had."""

    state: dict[str, Any]
    missing: tuple[str, ...]


class SaveHandle:
    """One save under way. `wait` gives the complete checkpoint, or raises what went wrong.

    `stall_seconds`: how long it has kept the training thread so far (a blocking save: all of its time).
    """

    def __init__(self) -> None:
        self.stall_seconds = 0.0
        self._staged = threading.Event()
        self._ended = threading.Event()
        self._info: CheckpointInfo | None = None
        self._error: CheckpointError | None = None
        self._thread: threading.Thread | None = None

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def finished_within(self, seconds: float) -> bool:
        """Waits at most `seconds` for the save to end, well or not."""
        return self._ended.wait(seconds)

    def wait(self) -> CheckpointInfo:
        """Returns once the checkpoint is complete. Raises `CheckpointError` if it never will be."""
        self._ended.wait()
        if self._thread is not None:
            # A thread that still runs when the interpreter ends is torn out of native code, which aborts the process.
            self._thread.join()
        if self._info is None:
            raise self._error or CheckpointError("the save ended without a result")
        return self._info

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += time.perf_counter() - start

    def _start(self, name: str, save: Callable[[], CheckpointInfo]) -> None:
        def work() -> None:
            _yield_to_training()
            self._run(save)

        self._thread = threading.Thread(target=work, name=name, daemon=True)
        self._thread.start()

    def _run(self, save: Callable[[], CheckpointInfo]) -> None:
        try:
            self._info = save()
        except CheckpointError as error:
            self._error = error
        except BaseException as error:  # DCP's own is a BaseException; and nobody stands above a thread
            self._error = CheckpointError(f"a checkpoint was not saved: {transfer.root_cause(error)}")
            self._error.__cause__ = error
        finally:
            self._staged.set()
            self._ended.set()


def _yield_to_training() -> None:
    """Gives this thread the lowest priority where threads have one of their own, so that a step that needs every core gets it."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class CheckpointStore:
    """The checkpoints below `root`, for all ranks of `world`. Methods are collectives over the world, unless they
    say otherwise.

    At the start, what a killed run left half-written is removed. `keep_last`: how many complete checkpoints to keep
    after each save (None: all). Use it in a `with`, which waits for a save under way.
    """

    def __init__(self, root: Path, world: World, *, keep_last: int | None = None) -> None:
        self.directory = CheckpointDirectory(root)
        self._keep_last = keep_last
        # A saving thread must not share a group with the training thread: their collectives would mix.
        self._world = replace(world, control_group=world.new_control_group())
        self._shares = WriteShares()
        self._buffers = StagingBuffers()
        self._overlapped: tuple[Optimizer, ...] = ()
        self._pending: SaveHandle | None = None
        for leftover in on_main(self._world, self.directory.clean_up):
            if world.is_main:
                _log.warning("removed %s, left by a run that was interrupted while saving", leftover)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._pending is not None:
            # What ended the run matters more than this save; but when the ranks still live, it can be completed.
            self._pending.finished_within(_GRACE_SECONDS)

    def save(
        self, step: int, state: Mapping[str, Any], *, metadata: Mapping[str, Any], asynchronous: bool
    ) -> SaveHandle:
        """Saves `state` as the checkpoint of `step`, after any save still under way (whose error it raises).

        `state`: nested mappings of tensors, DTensors, pieces and picklable objects. What several ranks hold of one
        name must be equal where it overlaps; what differs belongs below `per_rank`, under names that differ. `metadata`
        (JSON) goes into the manifest. A synchronous save raises its own error here, an asynchronous one at the next
        `poll`, `wait` or `save`. Until that one is done `state` may change, but not its shapes.
        """
        handle = SaveHandle()
        with handle._stalling():
            self.wait()
            shares = self._shares.mine(in_pieces(flatten(state)), self._world)
            if asynchronous:
                late = changed_only_by(self._overlapped, shares)
                moment = moment_of(shares)
                staged = self._buffers.copy({key: value for key, value in shares.items() if key not in late}, moment)
                self._pending = handle
                handle._start(
                    f"checkpoint-{step}",
                    lambda: self._stage_and_write(handle, step, shares, staged, late, moment, metadata),
                )
            else:
                live = {key: value.local if isinstance(value, Piece) else value for key, value in shares.items()}
                handle._run(lambda: self._write(step, shares, live, metadata))
                handle.wait()
        return handle

    def overlap_with(self, optimizers: Sequence[Optimizer]) -> None:
        """Lets asynchronous saves copy what these optimizers own while training goes on. No collective.

        Their parameters and moments then change in `step` only, which waits for such a copy (a hook sees to that).
        Whoever changes them otherwise calls `finish_staging` first. Without this all is copied before `save` returns.
        """
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda *_: self.finish_staging())
        self._overlapped = (*self._overlapped, *optimizers)

    def finish_staging(self) -> None:
        """Returns once the state of a save under way has been copied, and may change. No collective."""
        if self._pending is not None and not self._pending._staged.is_set():
            with self._pending._stalling():
                self._pending._staged.wait()

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way, whose thread issues collectives. No collective."""
        return self._pending is not None and not self._pending.done

    def poll(self) -> None:
        """Raises the error of an asynchronous save that has failed since the last look. Never waits. No collective."""
        if self._pending is not None and self._pending.done:
            self.wait()

    def wait(self) -> CheckpointInfo | None:
        """Waits for the save under way and returns its checkpoint; None without one. Raises its `CheckpointError`."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.wait()

    def latest(self, *, on_corrupt: Callable[[CorruptCheckpoint], None] | None = None) -> CheckpointInfo | None:
        """The newest checkpoint whose every file matches its manifest; None where none was ever made. All ranks read
        a part each.

        Corrupt ones that are met on the way to it are reported (a warning, and `on_corrupt` on every rank), renamed
        so that they no longer count, and passed over. Raises `CorruptCheckpointError` when there are checkpoints and
        none is good, and `CheckpointError` when one cannot be read or is of another version; then nothing is renamed.
        """
        self.wait()
        paths, aside = on_main(
            self._world, lambda: (self.directory.step_paths()[::-1], self.directory.set_aside_paths())
        )
        corrupt: list[tuple[Path, list[str]]] = []
        for path in paths:
            info, problems = self._examine(path)
            if info is not None and not problems:
                for bad_path, reasons in corrupt:
                    self._pass_over(bad_path, reasons, on_corrupt)
                return info
            corrupt.append((path, problems))
        if corrupt or aside:
            found = [f"{path.name}: {', '.join(problems)}" for path, problems in corrupt]
            raise CorruptCheckpointError(
                f"{self.directory.root} holds checkpoints, and none is good ({'; '.join(found) or aside[-1].name}); "
                "to begin anew, remove that folder, or start under another name (--set run.name=...)"
            )
        return None

    def prune(self, keep_last: int) -> tuple[Path, ...]:
        """Removes all but the newest `keep_last` checkpoints, never the last good one; returns what was removed."""
        self.wait()
        return on_main(self._world, lambda: self.directory.prune(keep_last))

    def contents(self, info: CheckpointInfo) -> dict[str, SavedTensor | None]:
        """The name of every entry in a checkpoint, with its shape and type, or None for an object. No collective."""
        return transfer.contents(info.path)

    def load(self, info: CheckpointInfo, state: Mapping[str, Any]) -> LoadedState:
        """Fills the tensors and pieces of `state` in place from the checkpoint, on any number of ranks and any layout.

        Objects are returned, not changed in place. Names, shapes and types must agree exactly with what was saved,
        over all ranks together, or `CheckpointError` says what does not. Only entries below `per_rank` may be
        missing, since another number of ranks has others. The files are not verified here: `latest` does that.
        """
        self.wait()
        flat = in_pieces(flatten(state))
        saved = self.contents(info)
        missing = tuple(key for key in flat if key not in saved and key.startswith(PER_RANK))
        wanted = {key: value for key, value in flat.items() if key not in missing}
        problems = differences(wanted, saved)
        asked: set[str] = set()
        for rank, (keys, found) in enumerate(self._world.all_gather_object((list(wanted), problems))):
            asked |= set(keys)
            problems = problems or [f"rank {rank}: {problem}" for problem in found]
        unread = sorted(key for key in saved if key not in asked and not key.startswith(PER_RANK))
        if unread:
            problems = [*problems, f"it has {some_of(unread)}, which this run does not"]
        if problems:
            raise CheckpointError(
                f"checkpoint {info.path} does not fit this run: {'; '.join(problems)}. "
                "Continue with the configuration that it was saved with, or start a run of another name"
            )
        objects = transfer.read(info.path, wanted, self._world)
        return LoadedState(state=nested_like(state, objects), missing=missing)

    def _stage_and_write(
        self,
        handle: SaveHandle,
        step: int,
        shares: FlatState,
        staged: FlatState,
        late: Set[str],
        moment: Moment,
        metadata: Mapping[str, Any],
    ) -> CheckpointInfo:
        staged |= self._buffers.copy({key: shares[key] for key in late}, moment)
        handle._staged.set()
        return self._write(step, shares, staged, metadata)

    def _write(self, step: int, shares: FlatState, staged: FlatState, metadata: Mapping[str, Any]) -> CheckpointInfo:
        """Writes, hashes and commits one checkpoint. Runs on every rank at once; all succeed, or all raise."""
        world = self._world
        target = on_main(world, partial(self.directory.begin, step))
        transfer.write(target, shares, staged, world)
        files: dict[str, FileRecord] = {}
        for record in on_every_rank(world, lambda: _record_own_files(target, world.rank)):
            files |= record
        return on_main(world, lambda: self._commit(step, files, metadata))

    def _commit(self, step: int, files: Mapping[str, FileRecord], metadata: Mapping[str, Any]) -> CheckpointInfo:
        info = self.directory.commit(step, world_size=self._world.world_size, metadata=metadata, files=files)
        if self._keep_last is not None:
            self.directory.prune(self._keep_last, known_good=info)
        return info

    def _pass_over(
        self, path: Path, problems: Sequence[str], on_corrupt: Callable[[CorruptCheckpoint], None] | None
    ) -> None:
        """Sets a corrupt checkpoint aside, and reports it."""
        aside = on_main(self._world, partial(self.directory.set_aside, path))
        if self._world.is_main:
            _log.warning(
                "checkpoint %s is corrupt (%s): set aside as %s, and passed over", path, "; ".join(problems), aside
            )
        if on_corrupt is not None:
            step = int(path.name.removeprefix("step-"))
            on_corrupt(CorruptCheckpoint(step=step, path=aside, problems=tuple(problems)))

    def _examine(self, path: Path) -> tuple[CheckpointInfo | None, list[str]]:
        """The checkpoint at `path` and all its problems, alike on all ranks, each of which reads a part of it."""
        world = self._world

        def read() -> tuple[CheckpointInfo | None, list[str]]:
            try:
                return self.directory.read(path), []
            except CorruptCheckpointError as error:
                return None, [str(error)]

        info, problems = on_main(world, read)
        if info is not None:
            found = on_every_rank(world, lambda: find_problems(info, part=world.rank, num_parts=world.world_size))
            problems = sorted({problem for part in found for problem in part})
        return info, problems


def _record_own_files(directory: Path, rank: int) -> dict[str, FileRecord]:
    """Reads back and records the files that this rank has written. Rank 0 wrote the metadata too."""
    own = [*directory.glob(f"__{rank}_*.distcp"), *([directory / ".metadata"] if rank == 0 else [])]
    return {path.name: record_file(path) for path in own}
