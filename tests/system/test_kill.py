"""`kill -9` of a rank of a real `mega train --ranks 2`, at several moments: the same command continues as if nothing was."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from tests.megamodel.train.jobs import write_corpus
from tests.system.runs import Run, ranks_of, wait_until_gone

STEPS = 60
CONFIG = """
[run]
seed = 5
[model]
preset = "moe-tiny"
[data]
source = "text"
path = "{root}/corpus"
cache_directory = "{root}/cache"
seq_len = 32
held_out_fraction = 0.1
tokenizer = {{ vocab_size = 280 }}
[train]
steps = {steps}
global_batch_size = 8
micro_batch_size = 2
precision = "fp32"
compile = "off"
[train.optimizer]
name = "muon"
[train.checkpoint]
every_steps = 7
[export]
format = "none"
[generate]
max_new_tokens = 2
"""


def _run(root: Path, name: str) -> Run:
    return Run(root=root, name=name, config=root / "run.toml", ranks=2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("kill")
    write_corpus(root / "corpus")
    (root / "run.toml").write_text(CONFIG.format(root=root, steps=STEPS))
    whole = _run(root, "whole")
    whole.finish()
    return whole


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "after_step"), [(1, 1), (0, 13), (1, 30)])
def test_kill_9_of_a_rank_then_the_same_command(undisturbed: Run, rank: int, after_step: int) -> None:
    run = _run(undisturbed.root, f"killed-{rank}-{after_step}")
    with run.started() as process:
        run.wait_until(process, lambda: bool(run.figures()))
        members = ranks_of(process)  # now, since to look for them takes steps
        run.wait_until(process, lambda: len(run.figures()) >= after_step)
        members[rank].send_signal(signal.SIGKILL)
        assert process.wait(timeout=120) == 1
        # No orphan steps on.
        _, alive = psutil.wait_procs(list(members.values()), timeout=60)
        assert not alive
        assert not wait_until_gone(process.pid)
    assert f"rank {rank}" in run.said
    assert "SIGKILL" in run.said
    assert len(run.figures()) < STEPS
    run.finish()
    assert run.figures() == undisturbed.figures()


@pytest.mark.slow
def test_kill_9_of_the_launcher_leaves_no_rank(undisturbed: Run) -> None:
    run = _run(undisturbed.root, "launcher-killed")
    with run.started() as process:
        run.wait_until(process, lambda: bool(run.figures()))
        members = ranks_of(process)
        assert len(members) == 2
        process.kill()
        process.wait(timeout=60)
        _, alive = psutil.wait_procs(list(members.values()), timeout=60)
        assert not alive
        assert not wait_until_gone(process.pid)
    run.finish()
    assert run.figures() == undisturbed.figures()
