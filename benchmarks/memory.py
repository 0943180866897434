"""Peak memory of a rank in a training step, as counted tensor by tensor, against the formula: one rank, then every way to
spread a model and to keep less of its activations.

    python benchmarks/memory.py

The figure behind `megamodel/train/memory.py`. Bytes are those of tensors, uncompiled, on CPU ranks with gloo: what an
allocator adds, and what a compiler saves, is not in them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from reporting import add_output_options, report

BOUND = 1.10
SEQ_LEN = 256
DENSE: dict[str, Any] = {
    "vocab_size": 2048,
    "max_seq_len": SEQ_LEN,
    "num_layers": 4,
    "d_model": 256,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 32,
    "d_ff": 768,
}
MOE: dict[str, Any] = {**DENSE, "moe": {"num_experts": 8, "top_k": 2, "d_ff": 256, "num_shared_experts": 1}}
MODELS = {"dense": DENSE, "moe": MOE}

# Name: ranks, model, keys of [train], keys of [parallel].
CASES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "plain": (1, "dense", {}, {}),
    "plain, bf16": (1, "dense", {"precision": "bf16"}, {}),
    "plain, MoE": (1, "moe", {}, {}),
    "accumulation": (1, "dense", {"micro_batch_size": 2}, {}),
    "muon": (1, "dense", {"optimizer": {"name": "muon"}}, {}),
    "selective": (1, "dense", {"activation_memory": {"mode": "selective"}}, {}),
    "selective, attention": (1, "dense", {"activation_memory": {"mode": "selective", "save": ["attention"]}}, {}),
    "selective, MoE, bf16": (1, "moe", {"precision": "bf16", "activation_memory": {"mode": "selective"}}, {}),
    "full": (1, "dense", {"activation_memory": {"mode": "full"}}, {}),
    "full, every second": (1, "dense", {"activation_memory": {"mode": "full", "every_n_layers": 2}}, {}),
    "full, MoE": (1, "moe", {"activation_memory": {"mode": "full"}}, {}),
    "offload": (1, "dense", {"activation_memory": {"mode": "offload"}}, {}),
    "ddp": (2, "dense", {}, {"data_engine": "ddp"}),
    "fsdp": (2, "dense", {}, {"data_engine": "fsdp2"}),
    "fsdp, bf16": (2, "dense", {"precision": "bf16"}, {"data_engine": "fsdp2"}),
    "fsdp, kept gathered": (2, "dense", {}, {"data_engine": "fsdp2", "reshard_after_forward": False}),
    "fsdp, accumulation": (2, "dense", {"micro_batch_size": 2}, {"data_engine": "fsdp2"}),
    "fsdp, full": (2, "dense", {"activation_memory": {"mode": "full"}}, {"data_engine": "fsdp2"}),
    "hybrid": (4, "dense", {}, {"data_engine": "fsdp2", "dp_replicate": 2, "dp_shard": 2}),
    "tp": (2, "dense", {}, {"tp": 2}),
    "tp, selective": (2, "dense", {"activation_memory": {"mode": "selective"}}, {"tp": 2}),
    "tp, full": (2, "dense", {"activation_memory": {"mode": "full"}}, {"tp": 2}),
    "cp": (2, "dense", {}, {"cp": 2}),
    "cp, ring": (2, "dense", {}, {"cp": 2, "context_method": "ring"}),
    "ep": (2, "moe", {}, {"ep": 2}),
    "ep, fsdp": (4, "moe", {}, {"ep": 2, "data_engine": "fsdp2"}),
    "pp, 1f1b": (2, "dense", {"micro_batch_size": 2}, {"pp": 2}),
    "pp, gpipe": (2, "dense", {"micro_batch_size": 2}, {"pp": 2, "pipeline_schedule": "gpipe"}),
    "pp, full": (2, "dense", {"micro_batch_size": 2, "activation_memory": {"mode": "full"}}, {"pp": 2}),
    "pp, interleaved": (2, "dense", {"micro_batch_size": 2}, {"pp": 2, "pipeline_schedule": "interleaved_1f1b"}),
    "pp, tp, fsdp": (8, "dense", {"micro_batch_size": 2}, {"pp": 2, "tp": 2, "data_engine": "fsdp2"}),
}
GLOBAL_BATCH = 8
# DDP warns of a switch that it is given on purpose, and torchrun of threads that it takes away.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}


def measure(names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Every named case, each with one entry a rank. A collective over the ranks that all of these cases want."""
    import torch

    from megamodel.model.config import ModelConfig
    from megamodel.train.config import TrainConfig
    from megamodel.train.memory_measurement import measure_step
    from parallel.config import ParallelConfig
    from parallel.layout import resolve_layout
    from parallel.mesh import Mesh
    from parallel.world import open_world

    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {}
    with open_world(device="cpu") as world:
        for name in names:
            _, model, train, parallel = CASES[name]
            config = ParallelConfig(**parallel)
            step = measure_step(
                ModelConfig(**MODELS[model]),
                TrainConfig(**{"global_batch_size": GLOBAL_BATCH, "precision": "fp32", **train}),
                config,
                mesh=Mesh(world, resolve_layout(config, world.world_size)),
                seq_len=SEQ_LEN,
            )
            entry = {
                "rank": world.rank,
                "peak_bytes": step.peak.total,
                "by_kind": step.peak.by_kind,
                "predicted_bytes": step.predicted.peak,
                "ratio": step.ratio,
            }
            found[name] = world.all_gather_object(entry)
            if world.rank == 0:
                print(f"{name}: {found[name][0]['ratio']:.3f}", file=sys.stderr, flush=True)
        if world.rank == 0 and (path := os.environ.get("MEMORY_BENCHMARK_RESULT")):
            Path(path).write_text(json.dumps(found))
    return found


def measure_on_ranks(num_ranks: int, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The same in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        subprocess.run(
            [sys.executable, *launcher, __file__, "--measure", *names],
            check=True,
            env={**os.environ, **QUIET, "MEMORY_BENCHMARK_RESULT": str(path)},
        )
        result: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
        return result


def in_words(ranks: list[dict[str, Any]]) -> str:
    fullest = max(ranks, key=lambda rank: rank["peak_bytes"])
    ratios = [rank["ratio"] for rank in ranks]
    return (
        f"{fullest['peak_bytes'] / 2**20:.1f} MiB on the fullest of {len(ranks)} ranks; measured / predicted "
        f"{min(ratios):.3f} to {max(ratios):.3f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--measure", nargs="+", choices=CASES, help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return 0
    cases: dict[str, list[dict[str, Any]]] = {}
    for num_ranks in sorted({CASES[name][0] for name in options.cases}):
        names = [name for name in options.cases if CASES[name][0] == num_ranks]
        cases |= measure(names) if num_ranks == 1 else measure_on_ranks(num_ranks, names)
    result = {
        "cases": cases,
        "bound": BOUND,
        "met": all(1 / BOUND <= rank["ratio"] <= BOUND for ranks in cases.values() for rank in ranks),
        "summary": {name: in_words(ranks) for name, ranks in cases.items()},
    }
    return report("memory", result, options)


if __name__ == "__main__":
    sys.exit(main())
