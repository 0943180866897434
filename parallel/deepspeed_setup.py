"""How DeepSpeed is imported, checked and told what to do: the only file that imports it, and only when it is asked for."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from parallel.config import DeepSpeedConfig
from parallel.errors import ParallelError

_EXTRA = "install the extra `deepspeed` (pip install '.[deepspeed]')"
_VERSION = "0.19"
_BUCKET_ELEMENTS = 50_000_000


def check_deepspeed(config: DeepSpeedConfig, device: torch.device) -> None:
    """Raises `ParallelError`, in one line, if DeepSpeed or something it needs for `config` is missing on this host. Costs
    an import of DeepSpeed, so it is for the start of a rank."""
    where = (config.offload_optimizer, config.offload_parameters)
    if config.zero_stage != 3 and (config.offload_parameters != "none" or "nvme" in where):
        raise ParallelError(
            f"parallel.deepspeed: zero_stage {config.zero_stage} cannot offload parameters, nor anything to nvme; "
            "use zero_stage 3"
        )
    if "nvme" in where and config.nvme_path is None:
        raise ParallelError('parallel.deepspeed: offload to "nvme" needs nvme_path, a folder on a disk of each host')
    with deepspeed_environment(DS_ACCELERATOR=device.type):
        import_deepspeed(device)
        if "nvme" in where:
            builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
            if not builder.is_compatible():
                raise ParallelError(
                    'parallel.deepspeed: offload to "nvme" needs libaio, and it was not found on this host; '
                    'install it with its headers (Debian: libaio-dev), or offload to "cpu"'
                )


def deepspeed_settings(
    config: DeepSpeedConfig, numel: int, compute_dtype: torch.dtype, reduce_dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's own configuration. Sizes of batches mean nothing here, and accumulation is told in each micro step."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": min(numel, _BUCKET_ELEMENTS),
        "memory_efficient_linear": False,  # it would put a linear of its own into torch, for the whole process and for good
    }
    for key, place in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_parameters)):
        if place != "none":
            zero[key] = {"device": place, "pin_memory": device.type == "cuda"}
        if place == "nvme":
            zero[key]["nvme_path"] = config.nvme_path
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "communication_data_type": "bf16" if reduce_dtype == torch.bfloat16 else "fp32",
        # torch's fused AdamW is as vectorised on CPUs as DeepSpeed's own, which would be compiled on first use.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if config.zero_stage < 3:
        settings["gradient_allreduce_op"] = "sum"
    if compute_dtype == torch.bfloat16 and config.zero_stage > 1:
        # In stage 1 DeepSpeed has another optimizer for bf16 weights with fp32 gradients, one that skips no bad step.
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, for this kind of device."""
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ParallelError(f'data_engine "deepspeed": DeepSpeed is not installed; {_EXTRA}, or use "fsdp2"') from error
    if not deepspeed.__version__.startswith(f"{_VERSION}."):
        raise ParallelError(
            f'data_engine "deepspeed": DeepSpeed {deepspeed.__version__} is installed, and {_VERSION} is needed; {_EXTRA}'
        )
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator().device_name()
    if accelerator != device.type:
        reason = f"DeepSpeed was imported for {accelerator} before, and this run is on {device.type}"
        raise ParallelError(f"{reason}: set DS_ACCELERATOR={device.type}")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning
    )  # torch 2.13 renamed some
    # Else it compiles an all-reduce through shared memory, half a minute, which only inference would use.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def start_afresh() -> None:
    """What DeepSpeed keeps per process, as in a process that has had no other engine."""
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    # It would make a group of its own, with a time-out of its own, and keep it after that group has gone.
    groups._WORLD_GROUP = dist.group.WORLD
    # Stage 3 numbers all modules and parameters it ever sees, and ranks compare their numbers.
    offload: Any = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
    offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    importlib.import_module("deepspeed").zero.Init.param_id = 0


@contextmanager
def deepspeed_environment(**values: str) -> Iterator[None]:
    """The environment with `values`: the only way to tell DeepSpeed the device, and this process's place on its host."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
