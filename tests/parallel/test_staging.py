"""Copies of a state that training goes on with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.checkpoint.pieces import in_pieces
from parallel.checkpoint.staging import StagingBuffers, moment_of
from tests.requirements import requires


def state_on(device: str) -> dict[str, Any]:
    whole = {"w": torch.arange(1000.0, device=device), "alike": torch.ones(3, device=device)}
    return {**in_pieces(whole), "object": {"a": [1]}}


def test_copies_on_the_cpu_are_independent_and_need_no_moment() -> None:
    buffers, state = StagingBuffers(), state_on("cpu")
    moment = moment_of(state)
    assert moment == {}
    staged = buffers.copy(state, moment)
    state["w"].local.zero_()
    state["object"]["a"].append(2)
    assert torch.equal(staged["w"], torch.arange(1000.0))
    assert staged["object"] == {"a": [1]}
    assert buffers.copy(state, moment)["w"].data_ptr() == staged["w"].data_ptr()


@pytest.mark.gpu
@requires("cuda")
def test_copies_from_a_gpu_neither_wait_for_what_comes_after_nor_miss_what_came_before() -> None:
    buffers, state = StagingBuffers(), state_on("cuda")
    buffers.copy(state, moment_of(state))  # page-locked buffers and the stream are there from now on
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    state["w"].local.add_(1.0)  # queued behind the sleep, and before the moment
    moment = moment_of(state)
    later = torch.cuda.Event()
    torch.cuda._sleep(4_000_000_000)  # forward and backward, seconds of them
    later.record()
    staged = buffers.copy(state, moment)
    assert not later.query(), "the copy waited for work that was asked for after its moment"
    assert torch.equal(staged["w"], torch.arange(1000.0) + 1.0)
    assert staged["w"].is_pinned()
    torch.cuda.synchronize()
