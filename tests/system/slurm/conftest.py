"""Fixtures of tests that need SLURM."""

from collections.abc import Generator, Iterator

import pytest

from tests.requirements import require
from tests.system.slurm.cluster import SlurmOfHosts


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmOfHosts]:
    """Four hosts and a spare one. Whoever harms a host revives it."""
    require("netns")
    require("slurm")
    with SlurmOfHosts(spare=1) as made:
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows what the daemons and the jobs said, where a test fails."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("slurm")
    if report.failed and isinstance(cluster, SlurmOfHosts) and cluster.directory.is_dir():
        report.sections.append(("SLURM", cluster.logs()))
    return report
