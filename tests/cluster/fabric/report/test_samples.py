"""The samples are what the parts of this package really write."""

import json
from dataclasses import fields

from cluster.fabric.baseline import BaselineCheck, Regression
from cluster.fabric.findings import Finding, Verdict
from cluster.fabric.predict import Difference
from cluster.fabric.sweep import SweepResult
from tests.cluster.fabric.report import samples


def test_a_sweep() -> None:
    sweep = samples.sweep()
    assert json.loads(json.dumps(SweepResult.from_data(sweep).as_data())) == sweep


def test_a_verdict() -> None:
    data = samples.verdict(samples.SLOW_SENDER)
    verdict = Verdict(
        findings=tuple(Finding.from_data(finding) for finding in data["findings"]),
        **{key: data[key] for key in ("alpha_s", "beta_s_per_byte", "seconds", "rounds", "details")},
    )
    assert verdict.as_data() == data


def test_a_baseline_check() -> None:
    check = BaselineCheck(
        **{field.name: samples.BASELINE[field.name] for field in fields(BaselineCheck) if field.name != "regressions"},
        regressions=tuple(Regression(**regression) for regression in samples.BASELINE["regressions"]),
    )
    assert json.loads(json.dumps(check.as_data())) == samples.BASELINE


def test_predictions() -> None:
    for row in samples.PREDICTIONS:
        assert Difference(**row).as_data() == row
