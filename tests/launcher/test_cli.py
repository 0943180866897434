"""The frame of the command line: verbs shown, exit codes, errors in one line, one object with --json."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.config_loading import load_config
from launcher.errors import ConfigError
from launcher.output import Output
from launcher.verb import as_command, is_users_matter, report_error
from megamodel.train.stop import StopRequest
from parallel.errors import ParallelError
from tests.launcher.conftest import Mega


def imported_by(*arguments: str) -> list[str]:
    """Heavy packages that are in memory after a command."""
    code = (
        "import sys\nfrom launcher.cli import build_app\n"
        f"try:\n    build_app()({list(arguments)!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = ('torch', 'numpy', 'transformers', 'tokenizers', 'datasets', 'tensorboard')\n"
        "sys.stderr.write(','.join(name for name in heavy if name in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return [name for name in run.stderr.split(",") if name]


def test_help_and_checks_import_nothing_heavy(tiny: Path) -> None:
    assert imported_by("--help") == []
    assert imported_by("config", "check", str(tiny), "--ranks", "2") == []


def test_help_shows_the_verbs_that_work(mega: Mega) -> None:
    shown = mega("--help").out
    works = (
        "init",
        "doctor",
        "config",
        "data",
        "train",
        "launch",
        "cancel",
        "checkpoint",
        "fabric",
        "generate",
        "export",
        "smoke",
    )
    for verb in works:
        assert verb in shown
    for verb in ("plan", "bench"):
        assert verb not in shown


@pytest.mark.parametrize(
    "verb",
    [
        "init", "doctor", "config show", "config schema", "config check", "data prepare", "data info", "train",
        "launch", "cancel",
        "checkpoint list", "checkpoint verify", "checkpoint reshard", "generate", "export", "smoke",
        "fabric diagnose", "fabric sweep", "fabric pairs", "fabric watch", "fabric report", "fabric simulate",
        "fabric baseline save", "fabric baseline list", "fabric baseline check",
    ],
)  # fmt: skip
def test_every_verb_takes_json_and_debug(mega: Mega, verb: str) -> None:
    ended = mega(*verb.split(), "--help")
    assert ended.code == 0
    assert "--json" in ended.out
    assert "--debug" in ended.out


def test_bad_arguments_end_with_2(mega: Mega) -> None:
    assert mega("train").code == 2
    assert mega("no-such-verb").code == 2
    assert mega("train", "x.toml", "--ranks", "0").code == 2


def _end_training(error: Exception, *, asked: bool) -> None:
    with StopRequest():
        if asked:
            os.kill(os.getpid(), signal.SIGUSR1)
        raise error


def test_a_rank_that_was_asked_to_stop_does_not_tell_of_lost_others(capsys: pytest.CaptureFixture[str]) -> None:
    lost = "rank 1 of 2 lost the others in an all-reduce (Connection closed by peer)"
    for asked, error, told in (
        (True, ParallelError(lost), "stopped: another rank had ended before\n"),
        (True, RuntimeError("Gloo: Connection closed by peer"), "stopped: another rank had ended before\n"),
        (True, ParallelError("the disk is full"), "error: the disk is full\n"),
        (False, ParallelError(lost), f"error: {lost}\n"),
    ):
        with pytest.raises(type(error)):
            _end_training(error, asked=asked)
        assert report_error(error, Output(as_json=False), debug=False) == 1
        assert capsys.readouterr().err == told


def test_a_users_mistake_is_one_line_without_a_traceback(mega: Mega, tmp_path: Path) -> None:
    ended = mega("config", "check", tmp_path / "absent.toml")
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err == f"error: 1 problem in the configuration:\n  {tmp_path / 'absent.toml'}: no such file\n"


@pytest.mark.parametrize("arguments", [["config", "schema"], ["config", "schema", "--json"]])
def test_a_reader_that_leaves_is_no_error(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "launcher", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"error:" not in process.stderr.read()
        assert process.wait(timeout=60) == 141


def test_debug_shows_the_traceback_too(mega: Mega, tmp_path: Path) -> None:
    ended = mega("config", "check", tmp_path / "absent.toml", "--debug")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert load_config.__name__ in ended.err


def test_an_error_is_one_json_object_too(mega: Mega, tmp_path: Path) -> None:
    ended = mega("config", "check", tmp_path / "absent.toml", "--json")
    assert ended.code == 2
    assert ended.json["exit_code"] == 2
    assert ended.json["problems"] == [f"{tmp_path / 'absent.toml'}: no such file"]


class _RefusedError(Exception):
    exit_code = 3


@pytest.mark.parametrize(
    ("error", "code", "traceback"),
    [(_RefusedError("logits differ"), 3, False), (PermissionError("no"), 1, False), (ValueError("a bug"), 1, True)],
)
def test_errors_by_kind(capsys: pytest.CaptureFixture[str], error: Exception, code: int, traceback: bool) -> None:
    assert is_users_matter(error) is not traceback
    assert report_error(error, Output(as_json=False), debug=False) == code
    shown = capsys.readouterr().err
    assert ("ValueError: a bug" in shown) is traceback
    assert shown.endswith(f"error: {'ValueError: ' if traceback else ''}{error}\n")


def test_a_rank_leaves_its_reason_for_its_launcher(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "failure.json"
    monkeypatch.setenv("MEGA_FAILURE_FILE", str(path))
    monkeypatch.setenv("RANK", "0")
    assert report_error(_RefusedError("logits differ"), Output(as_json=True), debug=False) == 3
    record = json.loads(path.read_text())
    assert (record["message"], record["exit_code"], record["traceback"]) == ("logits differ", 3, "")
    assert capsys.readouterr() == ("", "")  # its launcher speaks
    monkeypatch.setenv("RANK", "1")
    report_error(ValueError("a bug"), Output(as_json=False), debug=False)
    assert "ValueError: a bug" in json.loads(path.read_text())["traceback"]
    assert "error: ValueError: a bug" in capsys.readouterr().err  # in the rank's own log


def test_of_many_failing_ranks_the_first_prints_the_object(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        report_error(_RefusedError("logits differ"), Output(as_json=True), debug=False)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "logits differ", "exit_code": 3}
    assert err.count("error: logits differ") == 3


def test_the_exit_code_of_a_verb_is_the_commands() -> None:
    import typer

    with pytest.raises(typer.Exit) as caught:
        as_command(lambda out: 75)(as_json=False, debug=False)
    assert caught.value.exit_code == 75


def test_init_writes_a_file_that_checks(mega: Mega, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = mega("init", "my run.toml", "--set", "train.steps=5", "--json")
    assert ended.code == 0
    assert ended.json == {"path": "my run.toml", "run_dir": "runs/my-run"}
    assert mega("config", "check", "my run.toml", "--ranks", "2").code == 0
    assert mega("config", "show", "my run.toml", "--json").json["config"]["train"]["steps"] == 5
    refused = mega("init", "my run.toml")
    assert refused.code == 2
    assert "my run.toml: is there already; choose another name, or overwrite it with --force" in refused.err
    assert mega("init", "my run.toml", "--force").code == 0


def test_show_tells_where_a_key_was_set(mega: Mega, tiny: Path) -> None:
    shown = mega("config", "show", tiny, "--set", "train.steps=9").out
    assert "steps = 9  # --set train.steps=9\n" in shown
    assert f"seq_len = 64  # {tiny}\n" in shown
    assert "num_layers = 2\n" in shown  # from the preset


def test_schema_explains_keys(mega: Mega) -> None:
    everything = mega("config", "schema").out
    assert "[train.optimizer]" in everything
    one = mega("config", "schema", "train.precision").out
    assert one.startswith('  train.precision ("fp32" | "bf16"; default "bf16")\n      ')
    assert one.count("\n") == 2
    section = mega("config", "schema", "train.schedule").out
    assert "train.schedule.warmup_steps (integer, >= 0; default 100)" in section
    assert "train.optimizer" not in section
    assert mega("config", "schema", "--json").json["title"] == "RunConfig"


def test_schema_of_an_unknown_key_names_the_nearest(mega: Mega) -> None:
    ended = mega("config", "schema", "train.optimiser")
    assert ended.code == 2
    assert ended.err == "error: train.optimiser: there is no such section or key; did you mean train.optimizer?\n"


def test_a_failed_check_names_the_ranks(mega: Mega, tiny: Path) -> None:
    assert mega("config", "check", tiny, "--ranks", "2").code == 0
    ended = mega("config", "check", tiny, "--ranks", "3")
    assert ended.code == 2
    assert "cannot be shared by 3 data ranks evenly" in ended.err


def test_config_error_carries_its_problems() -> None:
    assert ConfigError("x").problems == ()
    assert ConfigError.exit_code == 2


def test_init_blames_only_what_the_user_set(mega: Mega, tmp_path: Path) -> None:
    done = mega("init", str(tmp_path / "x.toml"), "--set", "data.source=text")
    assert done.code == 2
    assert "data.source=stdlib" not in done.err
    assert "needs path" in done.err


def test_a_missing_file_is_looked_for_among_the_configurations(
    mega: Mega, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.toml").touch()
    (tmp_path / "pyproject.toml").touch()
    assert "did you mean configs/quickstart.toml?" in mega("config", "check", "quickstrat.toml").err
    assert "pyproject" not in mega("config", "check", "project.toml").err
