"""What `--dry-run` shows of the ranks' environment is what they find."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launcher.jobs.job_record import BackendName
from launcher.jobs.preview import variables_of_ranks
from launcher.jobs.submission.plan import plan_launch
from tests.launcher.jobs.made_up_hosts import MadeUpJob


@pytest.mark.parametrize("threads", ["", "1"])
def test_all_variables_that_agents_set_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    job = MadeUpJob(tmp_path, ["a"], "mark('environ', json.dumps(dict(os.environ)))", launch="preflight.enabled = true")
    job.backend = type(job.backend)(["a"], {"TEST_RUN": str(job.root)})
    assert job.supervise().exit_code == 0
    found = json.loads((job.root / "environ-0-1").read_text())
    own = {
        name for name, value in found.items() if os.environ.get(name) != value and name not in ("TEST_RUN", "PMI_RANK")
    }

    def shown(backend: BackendName) -> set[str]:
        plan = plan_launch([job.folder.config], (), backend=backend, environ=os.environ)
        return {name for each in variables_of_ranks(plan, os.environ) for name in each.name.split(", ")}

    assert shown("local") == own
    assert shown("slurm") == own | {"MEGA_RUN"}
