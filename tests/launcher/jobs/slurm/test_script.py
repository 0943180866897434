"""The batch script: what each key becomes, that nothing in it is a command by accident, and templates of users."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.config import RunConfig, load_run_config
from launcher.errors import ConfigError
from launcher.jobs.slurm.client import directives_of
from launcher.jobs.slurm.script import render_script, template_text

_HERE = Path("/work/dir")


def config_of(*settings: str) -> RunConfig:
    return load_run_config((), ["model.preset=moe-7m", *settings]).config


def script_of(*settings: str, exclude: Sequence[str] = ()) -> str:
    return render_script(config_of(*settings), ranks_per_node=2, working_directory=_HERE, also_exclude=exclude)


def options_of(script: str) -> dict[str, str]:
    """As sbatch reads them: quotes hold words together."""
    return {name: " ".join(shlex.split(value)) for name, value in directives_of(script).items()}


def test_what_is_asked_for_without_any_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    script = script_of("run.name=big", "launch.nodes=4")
    assert script.startswith("#!/bin/bash\n")
    assert options_of(script) == {
        "job-name": "mega-big",
        "output": f"{tmp_path}/runs/big/launch/supervisor.log",
        "open-mode": "append",
        "chdir": "/work/dir",
        "nodes": "4",
        "ntasks-per-node": "2",
        "no-kill": "",
        "requeue": "",
        "signal": "B:USR1@120",
        "exclusive": "",
    }
    assert shlex.split(script.splitlines()[-1]) == ["exec", sys.executable, "-m", "launcher", "supervise", "runs/big"]


def test_every_key_becomes_an_option() -> None:
    script = script_of(
        "launch.nodes=4",
        "slurm.nodes=5",
        "slurm.partition=train",
        "slurm.account=lab",
        "slurm.qos=high",
        "slurm.time=1-12:00:00",
        "slurm.gpus=8",
        "slurm.cpus_per_rank=12",
        "slurm.memory=512G",
        "slurm.constraint=h100&ib",
        "slurm.exclusive=false",
        "slurm.exclude=n[3,7-8]",
        "slurm.mail_user=me@example.org",
        "slurm.signal_seconds=300",
        "slurm.requeue=false",
        'slurm.extra_lines=["#SBATCH --reservation=night"]',
        'slurm.setup_lines=["module load cuda", "ulimit -n 65536"]',
        exclude=["n9", "n1"],
    )
    options = options_of(script)
    assert {name: options[name] for name in options if name not in ("job-name", "output", "open-mode", "chdir")} == {
        "nodes": "5",
        "ntasks-per-node": "2",
        "no-kill": "",
        "no-requeue": "",
        "signal": "B:USR1@300",
        "time": "1-12:00:00",
        "partition": "train",
        "account": "lab",
        "qos": "high",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "mem": "512G",
        "constraint": "h100&ib",
        "exclude": "n[3,7-8],n1,n9",
        "mail-user": "me@example.org",
        "mail-type": "FAIL,END",
        "reservation": "night",
    }
    lines = script.splitlines()
    # sbatch reads no directive behind the first command.
    assert lines.index("#SBATCH --reservation=night") < lines.index("module load cuda") < lines.index("ulimit -n 65536")
    assert lines[-1].startswith("exec ")


def test_a_job_of_one_host_ends_with_it() -> None:
    """SLURM starts it again then; with --no-kill it might run on for ever, without anybody in it."""
    assert "no-kill" not in options_of(script_of())
    assert "no-kill" in options_of(script_of("slurm.nodes=2"))


def _run_script(tmp_path: Path, *setup_lines: str) -> subprocess.CompletedProcess[str]:
    """With a program in the supervisor's place that says `begun`."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho begun\n")
    program.chmod(0o755)
    script = script_of(f"slurm.setup_lines={json.dumps(setup_lines)}").replace(
        shlex.quote(sys.executable), str(program)
    )
    (tmp_path / "job.sh").write_text(script)
    return subprocess.run(["bash", "job.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)


def test_a_setup_line_that_fails_starts_nothing(tmp_path: Path) -> None:
    ended = _run_script(tmp_path, "false || echo fine", "cd nowhere/at/all", "echo more")
    assert (ended.returncode, ended.stdout) == (1, "fine\n")
    assert "which is of slurm.setup_lines: cd nowhere/at/all; nothing is started. Mend it" in ended.stderr
    assert _run_script(tmp_path, "true").stdout == "begun\n"


def test_a_warning_while_setup_lines_run_does_not_end_the_job(tmp_path: Path) -> None:
    assert _run_script(tmp_path, "kill -USR1 $$").stdout == "begun\n"
    assert _run_script(tmp_path, "kill -TERM $$").returncode == -signal.SIGTERM


def test_no_value_is_a_command(tmp_path: Path) -> None:
    odd = tmp_path / 'it\'s $(touch pwned) 100% "x" `touch pwned`; touch pwned'
    odd.mkdir()
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > said\n')
    program.chmod(0o755)
    text = "a'b; touch pwned #"
    keys = ("partition", "account", "qos", "constraint", "exclude", "mail_user", "mail_type")
    config = config_of(f"run.directory={odd}/runs", *(f"slurm.{key}={text}" for key in keys))
    script = render_script(config, ranks_per_node=1, working_directory=odd)
    options = options_of(script)
    assert options["chdir"] == str(odd)
    assert options["output"] == f"{odd}/runs/run/launch/supervisor.log".replace("%", "%%")
    assert [options[key.replace("_", "-")] for key in keys] == [text] * len(keys)
    (tmp_path / "job.sh").write_text(script.replace(shlex.quote(sys.executable), str(program)))
    subprocess.run(["bash", "job.sh"], cwd=tmp_path, check=True, timeout=30)
    assert (tmp_path / "said").read_text().splitlines() == ["-m", "launcher", "supervise", f"{odd}/runs/run"]
    assert not (tmp_path / "pwned").exists()


def test_a_line_break_begins_no_line_of_its_own() -> None:
    with pytest.raises(ConfigError, match="line break") as refused:
        script_of('slurm.constraint="a\\ntouch pwned"', 'slurm.exclude="n1\\tn2"')
    assert [problem.partition(" =")[0] for problem in refused.value.problems] == ["slurm.constraint", "slurm.exclude"]


def test_a_template_of_the_users_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "own.j2"
    path.write_text(
        "#!/bin/zsh\n#SBATCH --nodes={{ nodes }} -J {{ job_name }}\n"
        "{% if slurm.account %}#SBATCH -A {{ slurm.account | quote }}\n{% endif %}"
        "echo {{ run_directory }} {{ launch.min_nodes }}\nexec nice {{ supervisor }}\n"
    )
    script = script_of(f"slurm.template={path}", "launch.nodes=3", "launch.min_nodes=2", "slurm.account=a b")
    assert script.splitlines()[:4] == [
        "#!/bin/zsh",
        "#SBATCH --nodes=3 -J mega-run",
        "#SBATCH -A 'a b'",
        "echo runs/run 2",
    ]
    assert script.endswith(f"exec nice {sys.executable} -m launcher supervise runs/run\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#!/bin/sh\n{{ partition }}\nexec {{ supervisor }}\n", "'partition' is undefined; what a template may name: exclude, "),
        ("#!/bin/sh\n{{ slurm.parttion }}\nexec {{ supervisor }}\n", "no attribute 'parttion'"),
        ("#!/bin/sh\n{% if nodes %}\nexec {{ supervisor }}\n", "line 3: Unexpected end of template"),
        ("#!/bin/sh\n{{ nodes / 0 }}\nexec {{ supervisor }}\n", "ZeroDivisionError: division by zero"),
        ("exec {{ supervisor }}\n", "must begin with #!"),
        ("#!/bin/sh\necho done\n# {{ supervisor }}\n", "never starts the run"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_template_is_told(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "own.j2"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        script_of(f"slurm.template={path}")
    assert said in str(refused.value)
    assert f"slurm.template = {path}" in str(refused.value)


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"slurm.template = .*/none: cannot be read: No such file"):
        script_of(f"slurm.template={tmp_path}/none")


def test_our_own_template_can_be_theirs(tmp_path: Path) -> None:
    path = tmp_path / "own.j2"
    path.write_text(template_text())
    assert script_of(f"slurm.template={path}") == script_of()
