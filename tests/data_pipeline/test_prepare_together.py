"""Several processes, or hosts, that prepare the same data: one builds, the others wait, and a kill harms nobody."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.file_source import FileCorpus
from data_pipeline.prepare import open_prepared, prepare
from tests.data_pipeline.corpora import texts_of

# Prepares, says so stage by stage, and at the stage named in argv waits for a line that never comes.
PREPARE_IN_A_PROCESS = """
import sys
from data_pipeline.config import DataConfig
from data_pipeline.prepare import prepare

def report(stage, fraction):
    print(stage, flush=True)
    if stage == sys.argv[2]:
        sys.stdin.readline()

print(prepare(DataConfig.model_validate_json(sys.argv[1]), progress=report).manifest_hash)
"""


def _start(config: DataConfig, wait_at: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE_IN_A_PROCESS, config.model_dump_json(), wait_at]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "stage",
    [
        "training the tokenizer",
        "tokenizing train documents",
        "tokenizing held-out documents",
        "compressing held-out text for comparison",
    ],
)
def test_killed_at_any_stage_leaves_nothing_that_looks_whole(config: DataConfig, stage: str) -> None:
    process = _start(config, wait_at=stage)
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == stage:
                break
        process.kill()
        process.wait(timeout=60)
    cache = Path(config.cache_directory)
    assert [path.name for path in cache.glob("text-*") if path.is_dir()] == [
        f"{_name(cache)}.partial-{socket.gethostname()}-{process.pid}"
    ]
    with pytest.raises(DataError, match=r"not prepared: run `mega data prepare` first"):
        open_prepared(config)
    prepared = prepare(config)
    assert len(texts_of(prepared, "train") + texts_of(prepared, "held_out")) == 10
    assert [path for path in cache.glob("text-*") if path.is_dir()] == [prepared.directory]


def _name(cache: Path) -> str:
    (lock,) = cache.glob("*.lock")
    return lock.stem


def test_three_processes_at_once_build_one(config: DataConfig) -> None:
    processes = [_start(config) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0].split("\n") for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum("training the tokenizer" in lines for lines in outputs) == 1
    assert len({lines[-2] for lines in outputs}) == 1


def test_processes_at_once_read_the_corpus_once(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, waiting, reads = threading.Event(), threading.Event(), []
    fingerprint = FileCorpus.fingerprint

    def read_slowly(self: FileCorpus) -> str:
        reads.append(1)
        reading.set()
        assert waiting.wait(timeout=60)
        return fingerprint(self)

    def report(stage: str, fraction: float) -> None:
        if stage.startswith("waiting for another process"):
            waiting.set()

    monkeypatch.setattr(FileCorpus, "fingerprint", read_slowly)
    first = threading.Thread(target=lambda: prepare(config))
    first.start()
    assert reading.wait(timeout=60)
    prepare(config, progress=report)
    first.join(timeout=60)
    assert reads == [1]


def test_what_another_host_or_a_living_process_builds_is_left_alone(config: DataConfig) -> None:
    directory = prepare(config).directory
    directory.rename(directory.with_name("hidden"))
    host = socket.gethostname()
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait(timeout=60)
    kept = {f"{host}-{os.getppid()}", f"another-{dead.pid}", f"{host}-2-{dead.pid}", "notes"}
    for name in {*kept, f"{host}-{dead.pid}", f"{host}-{os.getpid()}"}:
        directory.with_name(f"{directory.name}.partial-{name}").mkdir()
    prepare(config)
    left = {path.name.partition(".partial-")[2] for path in directory.parent.glob("*.partial-*")}
    assert left == kept


def test_the_first_of_two_hosts_to_finish_is_taken(config: DataConfig) -> None:
    built = prepare(config).directory
    hidden = built.rename(built.with_name("hidden"))

    def other_host_finishes(stage: str, fraction: float) -> None:
        if stage == "tokenizing held-out documents":
            hidden.rename(built)

    times = {path.name: path.stat().st_mtime_ns for path in hidden.iterdir()}
    prepared = prepare(config, progress=other_host_finishes)
    assert times == {path.name: path.stat().st_mtime_ns for path in prepared.directory.iterdir()}
    assert not list(built.parent.glob("*.partial-*"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    stages: list[str] = []
    prepared = prepare(config, progress=lambda stage, fraction: stages.append(stage))
    assert prepared.directory.is_dir()
    told = f"{config.cache_directory} has no locks ({os.strerror(number)}): processes at once each do all of the work"
    assert told in stages


def test_a_lock_that_fails_otherwise_is_an_error(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: object, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(DataError, match=r"Input/output error: mend this, or set data\.path"):
        prepare(config)


def test_a_rank_may_leave_the_hashing_to_another(config: DataConfig) -> None:
    shard = prepare(config).directory / "train-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert prepare(config, verify=False).directory == shard.parent
    with pytest.raises(DataError, match="content does not match"):
        prepare(config)


def test_waits_for_the_process_that_builds(config: DataConfig) -> None:
    prepared = prepare(config)
    lock = prepared.directory.with_name(f"{prepared.directory.name}.lock")
    hidden = prepared.directory.rename(prepared.directory.with_name("hidden"))
    waiting, results = threading.Event(), []

    def report(stage: str, fraction: float) -> None:
        if stage.startswith("waiting for another process"):
            waiting.set()

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: results.append(prepare(config, progress=report)))
        thread.start()
        assert waiting.wait(timeout=60)
        hidden.rename(prepared.directory)
    thread.join(timeout=60)
    assert [result.manifest_hash for result in results] == [prepared.manifest_hash]
