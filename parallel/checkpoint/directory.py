"""What a directory of checkpoints holds on disk, and how it changes without ever showing half of one. No torch here.

    checkpoints/
      step-00000100/            complete: it has its final name AND a readable manifest
        manifest.json           step, when, on how many ranks, the trainer's own record, size and SHA-256 of every file
        .metadata, *.distcp     torch.distributed.checkpoint's bytes
      latest -> step-00000100   for people; the program itself looks at the steps
      .partial-step-00000200/   being written, or left by a run that was killed: removed at the next start, as are
                                .replaced-* and .removed-*, which hold what is on its way out
      corrupt-step-00000150/    found not to match its manifest, and set aside for inspection

Only one run may write to a directory at a time. Every method is for one process (rank 0 of a run); `store` adds ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from parallel.errors import CheckpointError, CorruptCheckpointError

MANIFEST = "manifest.json"
_LATEST = "latest"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL_PREFIX = ".partial-"
_REPLACED_PREFIX = ".replaced-"
_REMOVED_PREFIX = ".removed-"
_CORRUPT_PREFIX = "corrupt-"
_MANIFEST_VERSION: Literal[1] = 1


class FileRecord(BaseModel):
    """Size in bytes and SHA-256 (hex) of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str


class Manifest(BaseModel):
    """What a complete checkpoint says of itself. `saved_at` is in Unix seconds; `metadata` is the trainer's record."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = _MANIFEST_VERSION
    step: int
    world_size: int
    saved_at: float
    metadata: dict[str, Any]
    files: dict[str, FileRecord]


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """One complete checkpoint."""

    step: int
    path: Path
    manifest: Manifest

    @property
    def num_bytes(self) -> int:
        return sum(record.size for record in self.manifest.files.values())


@dataclass(frozen=True, kw_only=True)
class CorruptCheckpoint:
    """A checkpoint that was found corrupt: why, and where it lies now."""

    step: int
    path: Path
    problems: tuple[str, ...]


class CheckpointDirectory:
    """The checkpoints below `root`, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def list(self) -> tuple[CheckpointInfo, ...]:
        """All complete checkpoints, oldest first. Files are not read: `find_problems` does that."""
        complete = []
        for path in self.step_paths():
            try:
                complete.append(self.read(path))
            except CheckpointError:
                continue  # `step_paths` still names it
        return tuple(complete)

    def step_paths(self) -> tuple[Path, ...]:
        """Everything with the name of a finished checkpoint, oldest first, readable or not."""
        if not self.root.is_dir():
            return ()
        steps = {int(match[1]): path for path in self.root.iterdir() if (match := _STEP_NAME.fullmatch(path.name))}
        return tuple(steps[step] for step in sorted(steps))

    def set_aside_paths(self) -> tuple[Path, ...]:
        """Everything that was once found corrupt and set aside, by name."""
        return tuple(sorted(self.root.glob(f"{_CORRUPT_PREFIX}*"))) if self.root.is_dir() else ()

    def read(self, path: Path) -> CheckpointInfo:
        """The checkpoint at `path`.

        Raises `CorruptCheckpointError` when its manifest is missing or damaged, and a plain `CheckpointError` when it
        cannot be read just now or is of another version of this program: neither says that a byte of it is wrong.
        """
        try:
            content = (path / MANIFEST).read_bytes()
        except OSError as error:
            if not _is_missing_inside(path, error):
                raise _unreadable(path, MANIFEST, error) from error
            raise CorruptCheckpointError(
                f"checkpoint {path}: {MANIFEST} is missing; remove the directory and use an earlier one"
            ) from error
        _refuse_other_version(path, content)
        try:
            manifest = Manifest.model_validate_json(content)
        except ValidationError as error:
            raise CorruptCheckpointError(
                f"checkpoint {path}: {MANIFEST} is damaged; remove the directory and use an earlier one"
            ) from error
        if path.name != self.path_of(manifest.step).name:
            raise CorruptCheckpointError(
                f"checkpoint {path}: its manifest is of step {manifest.step}; give it back its own name"
            )
        return CheckpointInfo(step=manifest.step, path=path, manifest=manifest)

    def path_of(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def verify(self, info: CheckpointInfo) -> None:
        """Reads every file. Raises `CorruptCheckpointError`, naming all files that differ from the manifest."""
        problems = find_problems(info)
        if problems:
            raise CorruptCheckpointError(
                f"checkpoint {info.path} is corrupt: {'; '.join(problems)}; remove it and use an earlier one"
            )

    def clean_up(self) -> tuple[Path, ...]:
        """Removes what a killed run left half-done and mends `latest`. Returns what was removed."""
        if not self.root.is_dir():
            return ()
        for path in self.root.glob(f"{_REPLACED_PREFIX}*"):
            final = self.root / path.name.removeprefix(_REPLACED_PREFIX)
            if not final.exists():  # killed between the two renames of a replacement: the old one still is whole
                path.rename(final)
        unfinished = (_PARTIAL_PREFIX, _REPLACED_PREFIX, _REMOVED_PREFIX)
        leftovers = [path for path in self.root.iterdir() if path.name.startswith(unfinished)]
        for path in leftovers:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self._point_latest()
        return tuple(leftovers)

    def begin(self, step: int) -> Path:
        """An empty directory to write the checkpoint of `step` into; `commit` gives it its name."""
        partial = self._partial(step)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        return partial

    def commit(
        self, step: int, *, world_size: int, metadata: Mapping[str, Any], files: Mapping[str, FileRecord]
    ) -> CheckpointInfo:
        """Makes the written checkpoint of `step` a complete one, in one atomic rename after all is on disk."""
        partial, final = self._partial(step), self.path_of(step)
        written = {path.name for path in partial.iterdir()}
        if written != set(files):
            raise CheckpointError(
                f"checkpoint {partial}: ranks reported {sorted(files)}, but {sorted(written)} is there; "
                "all ranks must write to one shared file system"
            )
        manifest = Manifest(
            step=step, world_size=world_size, saved_at=time.time(), metadata=dict(metadata), files=dict(files)
        )
        with open(partial / MANIFEST, "w", encoding="utf-8") as file:
            file.write(manifest.model_dump_json(indent=1))
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(partial)
        if final.exists():  # a resume from an earlier step comes by here again
            replaced = self.root / f"{_REPLACED_PREFIX}{final.name}"
            final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced)
        else:
            partial.rename(final)
        _sync_directory(self.root)
        self._point_latest()
        return CheckpointInfo(step=step, path=final, manifest=manifest)

    def set_aside(self, path: Path) -> Path:
        """Renames a corrupt checkpoint, so that it no longer counts, and returns where it lies now."""
        aside = self.root / f"{_CORRUPT_PREFIX}{path.name}"
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        self._point_latest()
        return aside

    def prune(self, keep_last: int, *, known_good: CheckpointInfo | None = None) -> tuple[Path, ...]:
        """Removes all but the newest `keep_last` complete checkpoints, and returns what was removed.

        The last good one always stays: unless `known_good` (just written, say) is among the kept, those are read
        until one proves good, and if none does, the newest older one that is good stays too.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, not {keep_last}")
        newest_first = self.list()[::-1]
        kept, older = newest_first[:keep_last], [*newest_first[keep_last:]]
        safe = not older or any(known_good is not None and info.path == known_good.path for info in kept)
        if not safe and not any(_proves_good(info) for info in kept):
            last_good = next((info for info in older if _proves_good(info)), None)
            if last_good is None:
                return ()  # nothing here is good, and nothing is lost by keeping it
            older.remove(last_good)
        for info in older:
            # Out of sight first: a kill in the middle of a removal must not leave half a checkpoint under its name.
            removed = self.root / f"{_REMOVED_PREFIX}{info.path.name}"
            info.path.rename(removed)
            shutil.rmtree(removed)
        return tuple(info.path for info in older)

    def _partial(self, step: int) -> Path:
        return self.root / f"{_PARTIAL_PREFIX}{self.path_of(step).name}"

    def _point_latest(self) -> None:
        """Lets `latest` name the newest complete checkpoint, or nothing. Replaced atomically."""
        link = self.root / _LATEST
        complete = self.list()
        if not complete:
            link.unlink(missing_ok=True)
            return
        fresh = self.root / f"{_PARTIAL_PREFIX}{_LATEST}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(complete[-1].path.name)
        os.replace(fresh, link)


def record_file(path: Path) -> FileRecord:
    """Reads the file at `path` and records its size and hash."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(size=os.fstat(file.fileno()).st_size, sha256=digest.hexdigest())


def find_problems(info: CheckpointInfo, *, part: int = 0, num_parts: int = 1) -> list[str]:
    """Every way in which the files of `info` differ from its manifest; reads files `part, part + num_parts, ...`.

    With `num_parts` ranks each checking its own part, all of the checkpoint is read once. Raises `CheckpointError`
    when a file is there, or was a moment ago, and cannot be read: that is no sign that its bytes are wrong.
    """
    problems = []
    for name in sorted(info.manifest.files)[part::num_parts]:
        expected = info.manifest.files[name]
        try:
            size = (info.path / name).stat().st_size
            if size != expected.size:
                problems.append(f"{name} has {size} bytes instead of {expected.size}")
            elif record_file(info.path / name).sha256 != expected.sha256:
                problems.append(f"the content of {name} has changed (SHA-256 differs)")
        except OSError as error:
            if not _is_missing_inside(info.path, error):
                raise _unreadable(info.path, name, error) from error
            problems.append(f"{name} is missing")
    return problems


def _proves_good(info: CheckpointInfo) -> bool:
    """Whether every file can be read and is what the manifest says."""
    try:
        return not find_problems(info)
    except CheckpointError:
        return False


def _is_missing_inside(path: Path, error: OSError) -> bool:
    """Whether a finished checkpoint lacks a file. If the whole directory is out of sight, nothing is known of it."""
    return isinstance(error, FileNotFoundError) and path.is_dir()


def _unreadable(path: Path, name: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path}: cannot read {name} ({error.strerror}); nothing was changed: see that every rank can read "
        "the directory, then run this again; if it is lost for good, remove it"
    )


def _refuse_other_version(path: Path, content: bytes) -> None:
    """Raises `CheckpointError` for a manifest that another version of this program wrote, whatever else it holds."""
    try:
        version = json.loads(content)["version"]
    except (ValueError, TypeError, KeyError):
        return  # damaged: whoever reads all of it will say so
    if version != _MANIFEST_VERSION:
        raise CheckpointError(
            f"checkpoint {path}: its manifest is of version {version}, and this program reads version "
            f"{_MANIFEST_VERSION}; use the program that wrote it, or start a run of another name"
        )


def _sync_directory(path: Path) -> None:
    """Brings the names in a directory to disk, as fsync of a file brings its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
