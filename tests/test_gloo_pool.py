"""The pool itself: results in order, fresh worlds, and a clear account of whatever goes wrong."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch.distributed as dist

from parallel.world import World
from tests.gloo_pool import GlooPool, RankFailureError


def where(world: World, offset: int) -> tuple[int, int, int]:
    return os.getpid(), world.rank + offset, world.all_gather_object(1).count(1)


def misbehave(world: World, how: str) -> None:
    if world.rank == 1 and how == "raise":
        raise KeyError("what the rank has to say")
    if world.rank == 1 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if world.rank == 1 and how == "abort":
        os.abort()
    if how == "hang":
        threading.Event().wait(60)
    world.barrier()


def test_workers_are_used_again_in_worlds_of_any_size(gloo_ranks: GlooPool) -> None:
    three = gloo_ranks(3, where, 10)
    two = gloo_ranks(2, where, 20)
    assert [answer[1:] for answer in three] == [(10, 3), (11, 3), (12, 3)]
    assert [answer[1:] for answer in two] == [(20, 2), (21, 2)]
    assert [answer[0] for answer in two] == [answer[0] for answer in three[:2]]
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("how", "expected", "died", "timeout_s"),
    [
        ("raise", "KeyError: 'what the rank has to say'", (), 60.0),
        ("die", "rank 1 died (exit code -9)", (1,), 60.0),
        ("abort", "Fatal Python error: Aborted", (1,), 60.0),
        # By then both are there, on a busy machine too: they begin with the import of this file.
        ("hang", "in misbehave", (), 10.0),
    ],
)
def test_every_failure_has_an_account_and_the_pool_lives_on(
    how: str, expected: str, died: tuple[int, ...], timeout_s: float
) -> None:
    pool = GlooPool()
    try:
        with pytest.raises(RankFailureError) as caught:
            pool(2, misbehave, how, timeout_s=timeout_s)
        assert expected in str(caught.value)
        assert caught.value.died == died
        assert [answer[1] for answer in pool(2, where, 0)] == [0, 1]
    finally:
        pool.close()


def test_more_ranks_than_the_pool_has_are_refused(gloo_ranks: GlooPool) -> None:
    with pytest.raises(ValueError, match="1 to 8 ranks, not 9"):
        gloo_ranks(9, where, 0)
