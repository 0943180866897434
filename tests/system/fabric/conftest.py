"""Fixtures of tests that need hosts of their own."""

from collections.abc import Iterator

import pytest

from tests.requirements import require
from tests.system.fabric.hosts import FabricOfHosts


@pytest.fixture(scope="session")
def fabric() -> Iterator[FabricOfHosts]:
    """Eight hosts on two leaves. Whoever injects a fault into it takes it back."""
    require("netns")
    with FabricOfHosts() as made:
        yield made
