import re
import socket
import time
from pathlib import Path

import pytest

from launcher.config import RunConfig, load_run_config
from launcher.config_loading import LoadedConfig
from launcher.errors import ConfigError, RunError
from launcher.run_record import changes_to_run, find_run, new_attempt, record_begin, record_config, runs_below
from megamodel.train.run_directory import RunDirectory


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(*overrides: str) -> LoadedConfig[RunConfig]:
    return load_run_config((), ("model.preset=moe-tiny", "data.tokenizer.vocab_size=300", "data.seq_len=8", *overrides))


def with_checkpoint() -> None:
    Path("runs/run/checkpoints/step-00000004").mkdir(parents=True)


def test_the_resolved_configuration_lies_in_the_run() -> None:
    loaded = load()
    assert changes_to_run(loaded) == []
    assert not Path("runs").exists()  # to look changes nothing
    record_config(loaded.config)
    assert load_run_config([Path("runs/run/config.toml")]).config == loaded.config
    assert changes_to_run(loaded) == []


def test_a_run_may_grow_and_says_what_changed() -> None:
    record_config(load().config)
    with_checkpoint()
    assert changes_to_run(load("train.steps=2000", "data.cache_directory=elsewhere")) == [
        'data.cache_directory = "elsewhere", but was ".cache/data"',
        "train.steps = 2000, but was 1000",
    ]


def test_a_run_with_checkpoints_stays_the_same_run() -> None:
    record_config(load().config)
    with_checkpoint()
    before = Path("runs/run/config.toml").read_text()
    with pytest.raises(ConfigError) as caught:
        changes_to_run(load("model.num_layers=3", "run.seed=7", "data.tokenizer.path=x.json"))
    assert str(caught.value) == (
        "runs/run has checkpoints of another configuration:\n"
        "  --set run.seed=7: run.seed = 7, but was 1234\n"
        "  --set model.num_layers=3: model.num_layers = 3, but was 2\n"
        '  --set data.tokenizer.path=x.json: data.tokenizer.path = "x.json", but was not set\n'
        "Put these back to continue it, or start another run with --set run.name=..."
    )
    assert len(caught.value.problems) == 3
    assert Path("runs/run/config.toml").read_text() == before


def test_without_checkpoints_anything_may_change() -> None:
    record_config(load().config)
    assert changes_to_run(load("model.num_layers=3")) == ["model.num_layers = 3, but was 2"]


def test_keys_that_an_upgrade_brings_change_nothing_unless_they_are_set() -> None:
    record_config(load().config)
    with_checkpoint()
    file = Path("runs/run/config.toml")
    new = ("init_std = ", "requeue = ", "max_requeues = ", "hang_seconds = ", "nodes = ")
    lines = file.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(new)]
    assert len(kept) == len(lines) - len(new)
    file.write_text("\n".join(kept))
    assert changes_to_run(load()) == []
    assert changes_to_run(load("slurm.max_requeues=3")) == ["slurm.max_requeues = 3, but was not set"]


def test_a_section_that_was_not_there_is_a_change_though_its_keys_are_at_their_defaults() -> None:
    def dense(*overrides: str) -> LoadedConfig[RunConfig]:
        return load_run_config((), ("model.preset=dense-7m", *overrides))

    record_config(dense().config)
    experts = ("model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.d_ff=16")
    assert 'model.moe.router_score = "softmax", but was not set' in changes_to_run(dense(*experts))


@pytest.mark.parametrize("content", [b"[run\n", b"\xff\xfe"])
def test_a_damaged_configuration_is_told_with_its_mend(content: bytes) -> None:
    record_config(load().config)
    Path("runs/run/config.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^runs/run/config.toml: is damaged \(.+\); remove it: `mega train` with"):
        changes_to_run(load())


def test_each_start_has_logs_of_its_own() -> None:
    directory = RunDirectory(Path("runs/x"))
    assert new_attempt(directory) == Path("runs/x/logs/attempt-1")
    (directory.logs / "attempt-9").mkdir()
    (directory.logs / "attempt-old").mkdir()
    assert new_attempt(directory) == Path("runs/x/logs/attempt-10")


def test_a_run_is_found_by_its_folder_or_its_name() -> None:
    record_config(load().config)
    assert find_run(Path("runs/run")).root == Path("runs/run")
    assert find_run(Path("run")).root == Path("runs/run")


def test_a_run_that_is_not_there() -> None:
    record_config(load("run.name=quickstart").config)
    with pytest.raises(RunError, match=r"^runs/quikstart: there is no such run; did you mean runs/quickstart\?$"):
        find_run(Path("runs/quikstart"))
    with pytest.raises(RunError, match=r"^quikstart: there is no such run; did you mean runs/quickstart\?$"):
        find_run(Path("quikstart"))
    here = Path.cwd()
    looked = f"looked at {here}/zzz and {here}/runs/zzz; `mega train` and `mega launch` make one"
    with pytest.raises(RunError, match=f"^zzz: there is no such run; {re.escape(looked)}$"):
        find_run(Path("zzz"))
    with pytest.raises(RunError, match=r"^runs: is not the folder of a run, which holds config.toml$"):
        find_run(Path("runs"))


def test_a_run_that_waits_to_begin_is_one_for_those_who_ask_for_it() -> None:
    record_config(load().config)
    waiting = Path("runs/waiting/launch")
    waiting.mkdir(parents=True)
    (waiting / "config.toml").touch()
    assert find_run(Path("waiting"), launched=True).root == Path("runs/waiting")
    assert [run.root.name for run in runs_below(Path("runs"), launched=True)] == ["run", "waiting"]
    assert [run.root.name for run in runs_below(Path("runs"))] == ["run"]
    with pytest.raises(RunError, match=r"^runs/waiting: this run has not begun to train; `mega status waiting` tells"):
        find_run(Path("waiting"))
    with pytest.raises(RunError, match=r"did you mean runs/waiting\?$"):
        find_run(Path("wating"), launched=True)


def test_runs_may_lie_elsewhere() -> None:
    record_config(load("run.directory=other").config)
    assert find_run(Path("run"), below=Path("other")).root == Path("other/run")
    assert runs_below(Path("nowhere")) == []


def test_the_begin_of_a_process_is_an_event() -> None:
    before = time.time()
    directory = RunDirectory(Path("runs/x"))
    record_begin(directory, num_ranks=4, environ={"MEGA_HOST_NAME": "n3"})
    record_begin(directory, num_ranks=4, environ={})
    first, second = directory.read_events()
    assert (first["event"], first["host"], first["num_ranks"]) == ("begin", "n3", 4)
    assert first["began"] < before <= first["time"]
    assert second["host"] == socket.gethostname()
