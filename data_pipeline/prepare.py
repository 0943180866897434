"""From a corpus to a prepared data set: tokenizer, token shards, manifest. Done once, then shared by all runs.

A data set's name is a hash of the settings and the content that it is made from. It is built in
`<name>.partial-<host>-<pid>` under a lock, and renamed when every byte is on the disk: the name exists only for what is
whole. Hosts may share a cache on a file system whose locks do not reach from one to another: then each builds its own,
touches nothing of the others, and the first to finish is taken.
"""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.build import Progress, build
from data_pipeline.config import DataConfig
from data_pipeline.corpus import Corpus, open_corpus
from data_pipeline.errors import DataError
from data_pipeline.files import sha256_of_file, sha256_of_json, sync_to_disk, write_durably
from data_pipeline.prepared import PreparedData, load_prepared
from data_pipeline.tokenizer import tokenizer_file

# Raised when the same settings and content must give other files than before.
_RECIPE_VERSION = 1
# What a file system says that knows no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def prepare(config: DataConfig, *, progress: Progress | None = None, verify: bool = True) -> PreparedData:
    """The data set of a config: opened if it exists, built otherwise; see `load_prepared` for `verify`.

    Any number of processes may call this at once: one builds, the others wait for it. Of the ranks on one host, one
    that verifies is enough. Raises DataError for a corpus that cannot be used, and for a data set that has been
    damaged since it was built.
    """
    report = progress or _tell_nobody
    with _system_errors_as_data_errors(config):
        report("reading the corpus", 0.0)
        corpus = open_corpus(config)
        stamp = corpus.stamp()
        key = _key(config, corpus, stamp, report)
        directory = _directory(config, key)
        if not directory.exists():
            with _lock(directory.with_name(f"{directory.name}.lock"), report):
                # Another process may have built it while this one waited.
                if not directory.exists():
                    _build_and_publish(config, corpus, stamp, key, directory, report)
        report("checking the shards", 0.0)
        prepared = load_prepared(directory, verify=verify)
        report("ready", 1.0)
        return prepared


def open_prepared(config_or_directory: DataConfig | str | Path, *, verify: bool = True) -> PreparedData:
    """Opens a data set that another process has prepared, and never builds; see `load_prepared` for `verify`."""
    if not isinstance(config_or_directory, DataConfig):
        return load_prepared(config_or_directory, verify=verify)
    config = config_or_directory
    with _system_errors_as_data_errors(config):
        corpus = open_corpus(config)
        directory = _directory(config, _key(config, corpus, corpus.stamp(), _tell_nobody))
        if not directory.exists():
            raise DataError(
                f"{directory}: not prepared: run `mega data prepare` first; hosts that share a run also share "
                "data.cache_directory, or each prepares its own"
            )
        return load_prepared(directory, verify=verify)


def _tell_nobody(stage: str, fraction: float) -> None:
    """Progress of which nobody wants to hear."""


@contextmanager
def _system_errors_as_data_errors(config: DataConfig) -> Iterator[None]:
    """A full disk, a missing permission and the like, told with the file and the settings that chose it."""
    try:
        yield
    except OSError as error:
        where, what = error.filename or config.cache_directory, error.strerror or error
        raise DataError(f"{where}: {what}: mend this, or set data.path or data.cache_directory") from error


def _directory(config: DataConfig, key: str) -> Path:
    return Path(config.cache_directory).expanduser() / f"{config.source}-{key[:16]}"


def _key(config: DataConfig, corpus: Corpus, stamp: str, report: Progress) -> str:
    tokenizer = config.tokenizer.model_dump()
    if config.tokenizer.path is not None:
        tokenizer = {
            "sha256": sha256_of_file(tokenizer_file(config.tokenizer.path)),
            "end_of_text": config.tokenizer.end_of_text,
        }
    return sha256_of_json(
        {
            "recipe": _RECIPE_VERSION,
            "source": config.source,
            "held_out_fraction": config.held_out_fraction,
            "shard_tokens": config.shard_tokens,
            "tokenizer": tokenizer,
            "corpus": _fingerprint(config, corpus, stamp, report),
        }
    )


def _fingerprint(config: DataConfig, corpus: Corpus, stamp: str, report: Progress) -> str:
    """The corpus's fingerprint; remembered for as long as sizes and times say that nothing has changed, since reading
    a large corpus takes hours. So one process reads it, and the others wait."""
    remembered = Path(config.cache_directory).expanduser() / "fingerprints" / stamp
    if remembered.is_file():
        return remembered.read_text()
    with _lock(remembered.with_name(f"{stamp}.lock"), report):
        if remembered.is_file():
            return remembered.read_text()
        fingerprint = corpus.fingerprint()
        if corpus.stamp() == stamp:
            write_durably(remembered, fingerprint.encode())
        return fingerprint


@contextmanager
def _lock(path: Path, report: Progress) -> Iterator[None]:
    """Held by one process at a time; the system releases it when the process ends, however it ends.

    Some file systems have no locks. There every process does the work itself, and what is first under its name is taken.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that prepares the same data", 0.0)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            report(f"{path.parent} has no locks ({error.strerror}): processes at once each do all of the work", 0.0)
        yield


def _build_and_publish(
    config: DataConfig, corpus: Corpus, stamp: str, key: str, directory: Path, report: Progress
) -> None:
    """Builds from the corpus as it was at its stamp, from before the key was made, or raises DataError."""
    prefix = f"{directory.name}.partial-{socket.gethostname()}-"
    for leftover in directory.parent.iterdir():
        pid = leftover.name.removeprefix(prefix)
        if leftover.name.startswith(prefix) and pid.isdecimal() and not _is_other_process(int(pid)):
            shutil.rmtree(leftover)
    partial = directory.with_name(f"{prefix}{os.getpid()}")
    partial.mkdir()
    try:
        build(config, corpus, key, partial, report)
        if corpus.stamp() != stamp:
            raise DataError(f"{config.path or config.source}: the corpus changed while it was read: run this again")
        sync_to_disk(partial)
        try:
            partial.rename(directory)
        except OSError:
            if not directory.exists():
                raise
            shutil.rmtree(partial)  # another host, whose lock is not seen here, has built the same
        sync_to_disk(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _is_other_process(pid: int) -> bool:
    """Whether another process of this host than this one has the number now."""
    if pid == os.getpid():
        return False  # it had our number before us
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True
