"""Fixtures that all tests share."""

from collections.abc import Iterator

import pytest

from tests.gloo_pool import GlooPool


@pytest.fixture(scope="session")
def gloo_ranks() -> Iterator[GlooPool]:
    """`gloo_ranks(n, function, *args)` runs `function(world, *args)` on n gloo ranks; see `GlooPool`."""
    pool = GlooPool()
    yield pool
    pool.close()
