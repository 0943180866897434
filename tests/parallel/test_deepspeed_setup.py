"""What is missing for DeepSpeed on a host, or cannot be offloaded, is told in one sentence."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
import torch

from parallel.config import DeepSpeedConfig
from parallel.deepspeed_setup import check_deepspeed
from parallel.errors import ParallelError
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.requirements import requires

pytestmark = requires("deepspeed")
TIMEOUT = 200.0
"""Seconds. A rank's first use of DeepSpeed imports torch's compiler, which takes long on a busy machine."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 2, "offload_parameters": "cpu"}, "use zero_stage 3"),
        ({"zero_stage": 1, "offload_optimizer": "nvme", "nvme_path": "/x"}, "use zero_stage 3"),
        ({"zero_stage": 3, "offload_optimizer": "nvme"}, "needs nvme_path"),
    ],
)
def test_offload_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ParallelError, match=message):
        check_deepspeed(DeepSpeedConfig(**settings), torch.device("cpu"))


def missing_libaio(world: World) -> str:
    builders = importlib.import_module("deepspeed.ops.op_builder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders.AsyncIOBuilder, "is_compatible", lambda self: False)
        config = DeepSpeedConfig(zero_stage=3, offload_optimizer="nvme", nvme_path="/x")
        with pytest.raises(ParallelError) as caught:
            check_deepspeed(config, world.device)
    return str(caught.value)


def test_nvme_without_libaio_is_one_sentence(gloo_ranks: GlooPool) -> None:
    (message,) = gloo_ranks(1, missing_libaio, timeout_s=TIMEOUT)
    assert "libaio-dev" in message
    assert "\n" not in message


def test_absence_is_one_sentence_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ParallelError) as caught:
        check_deepspeed(DeepSpeedConfig(), torch.device("cpu"))
    assert str(caught.value) == (
        'data_engine "deepspeed": DeepSpeed is not installed; install the extra `deepspeed` '
        "(pip install '.[deepspeed]'), or use \"fsdp2\""
    )


@pytest.mark.parametrize(("version", "message"), [("0.18.3", "DeepSpeed 0.18.3 is installed, and 0.19 is needed")])
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, message: str) -> None:
    other = types.ModuleType("deepspeed")
    other.__dict__["__version__"] = version
    monkeypatch.setitem(sys.modules, "deepspeed", other)
    with pytest.raises(ParallelError, match=message):
        check_deepspeed(DeepSpeedConfig(), torch.device("cpu"))
