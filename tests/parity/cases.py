"""The layouts that are held against one rank: each style alone, all pairs, compositions of three and more, and a sampler
that draws from everything that a configuration can say."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from megamodel.train.config import TrainConfig
from megamodel.train.layout import layout_demands
from parallel.config import ParallelConfig
from parallel.layout_check import layout_problems
from tests.megamodel.small import MLA, small_config
from tests.parity.harness import GLOBAL_BATCH, MOE, SEQ_LEN, SHAPE, Case

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")
METHODS = ("all_gather", "ring", "ulysses")

FSDP = {"data_engine": "fsdp2"}
STYLES: dict[str, dict[str, Any]] = {
    "ddp": {"dp_shard": 2},
    "fsdp2": {"dp_shard": 2, **FSDP},
    "zero2": {"dp_shard": 2, **FSDP, "reshard_after_forward": False},
    "replicate": {"dp_replicate": 2, **FSDP},
    "tp": {"tp": 2},
    "cp": {"cp": 2},
    "ep": {"ep": 2},
    "expert_tp": {"expert_tp": 2},
    "pp": {"pp": 2},
}


def alone() -> list[Case]:
    """Each style by itself on two ranks; dense ones without experts too; every schedule and context method."""
    cases = [Case(ranks=2, parallel=style) for style in STYLES.values()]
    cases += [Case(ranks=2, moe=False, parallel=STYLES[name]) for name in ("ddp", "fsdp2", "tp", "cp", "pp")]
    cases += [Case(ranks=2, parallel={"pp": 2, "pipeline_schedule": schedule}) for schedule in SCHEDULES]
    cases += [Case(ranks=2, parallel={"cp": 2, "context_method": method}) for method in METHODS[1:]]
    cases += [Case(ranks=2, parallel={"tp": 2}, model={"tie_embeddings": True})]
    cases += [
        Case(ranks=2, parallel={"pp": 2, "pipeline_schedule": schedule}, model={"tie_embeddings": True})
        for schedule in ("1f1b", "zbv")
    ]
    cases += [Case(ranks=2, parallel={"pp": 2, "pipeline_split": [1, 3]})]
    cases += [Case(ranks=4, parallel={"tp": 4}), Case(ranks=4, parallel={"tp": 4}, model={"num_kv_heads": 8})]
    return cases


def pairs() -> list[Case]:
    """Every two axes together on four ranks, under FSDP2 and under plain sums; the experts' axes fold the others."""
    degrees = {"dp_shard": 2, "dp_replicate": 2, "tp": 2, "cp": 2, "pp": 2}
    names = list(degrees)
    cases = []
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            layout = {first: 2, second: 2}
            cases.append(Case(ranks=4, parallel={**layout, **FSDP}))
            cases.append(Case(ranks=4, parallel=layout))
        for folded in ("ep", "expert_tp"):
            if first not in ("pp", "dp_replicate"):
                cases.append(Case(ranks=2, parallel={first: 2, folded: 2, **FSDP}))
            else:
                cases.append(Case(ranks=4, parallel={first: 2, "dp_shard": 2, folded: 2, **FSDP}))
    cases.append(Case(ranks=4, parallel={"ep": 2, "expert_tp": 2}))
    cases += [
        Case(ranks=4, parallel={"pp": 2, "pipeline_schedule": schedule, **FSDP})
        for schedule in SCHEDULES
        if schedule != "1f1b"
    ]
    return cases


def compositions() -> list[Case]:
    """Three axes and more on eight ranks, each at least once with every other."""
    small = {"micro_batch_size": 1}
    eight: list[dict[str, Any]] = [
        {"pp": 2, "tp": 2, "dp_shard": 2},
        {"pp": 2, "tp": 2, "dp_shard": 2, **FSDP},
        {"pp": 2, "cp": 2, "dp_shard": 2, "ep": 2, **FSDP},
        {"pp": 2, "cp": 2, "dp_shard": 2, "ep": 4, "context_method": "ring"},
        {"tp": 2, "cp": 2, "dp_shard": 2, **FSDP},
        {"tp": 2, "cp": 2, "dp_shard": 2, "ep": 8},
        {"tp": 2, "cp": 2, "dp_replicate": 2, "ep": 4, **FSDP},
        {"tp": 2, "dp_shard": 2, "dp_replicate": 2, "ep": 2, "expert_tp": 2, **FSDP},
        {"tp": 2, "cp": 4, "context_method": "ulysses", "expert_tp": 2, **FSDP},
        {"tp": 4, "dp_shard": 2, "ep": 4, "expert_tp": 2, **FSDP},
        {"pp": 2, "tp": 2, "cp": 2, "ep": 2, "pipeline_schedule": "interleaved_zero_bubble", **FSDP},
        {"pp": 2, "tp": 2, "dp_shard": 2, "ep": 4, "pipeline_schedule": "zbv", **FSDP},
        {"pp": 2, "dp_replicate": 2, "cp": 2, "ep": 2, "pipeline_schedule": "dualpipev", **FSDP},
        {"pp": 4, "tp": 2, "pipeline_schedule": "gpipe"},
        {"pp": 2, "cp": 2, "tp": 2, "pipeline_schedule": "interleaved_1f1b", "context_method": "ring"},
    ]
    return [
        Case(ranks=8, parallel=layout, train=small if layout.get("pp", 1) > 1 else {}, model=_wide(layout))
        for layout in eight
    ]


def variants() -> list[Case]:
    """What else a layout may meet: latent attention, a selection bias, parameters in host memory, Muon under cuts."""
    latent = {"mla": MLA}
    bias = {"moe": {**MOE, "balance": "bias", "router_score": "sigmoid", "gate_scale": 2.5}}
    muon = {"optimizer": {"name": "muon", "lr": 1e-3, "muon_lr": 1e-3, "eps": 1e-5}}
    return [
        Case(ranks=2, parallel={"tp": 2}, model=latent),
        Case(ranks=2, parallel={"cp": 2, "context_method": "ring"}, model=latent),
        Case(ranks=4, parallel={"tp": 2, "pp": 2, **FSDP}, model=latent),
        Case(ranks=4, parallel={"tp": 2, "cp": 2, "context_method": "ulysses", **FSDP}, model=latent),
        Case(ranks=2, parallel={"pp": 2, "pipeline_schedule": "interleaved_1f1b"}, model=bias),
        Case(ranks=4, parallel={"ep": 2, "tp": 2, **FSDP}, model=bias),
        Case(ranks=2, parallel={**FSDP, "cpu_offload": True}),
        Case(ranks=4, parallel={"tp": 2, "ep": 2, **FSDP, "cpu_offload": True}),
        Case(ranks=4, parallel={"tp": 4}, train=muon),
        Case(ranks=4, parallel={"tp": 2, "ep": 2, "expert_tp": 2, **FSDP}, train=muon),
        Case(
            ranks=4, parallel={"pp": 2, "tp": 2, "pipeline_schedule": "zbv"}, train=muon, model={"tie_embeddings": True}
        ),
        Case(ranks=4, parallel={"pp": 2, "tp": 2, **FSDP}, model={"tie_embeddings": True}),
    ]


def compiled() -> list[Case]:
    """Blocks compiled on both sides."""
    on = {"compile": "on"}
    return [
        Case(ranks=2, moe=False, parallel={"tp": 2}, train=on),
        Case(ranks=4, moe=False, parallel={"tp": 2, **FSDP}, train=on),
        Case(ranks=2, parallel={"ep": 2}, train=on),
    ]


def recomputed() -> list[Case]:
    """Each mode of activation memory, with collectives inside the blocks."""
    layouts: list[dict[str, Any]] = [{"tp": 2, "ep": 2}, {"cp": 2, "context_method": "ring", **FSDP}, {"pp": 2}]
    return [
        Case(ranks=2, parallel=layout, train={"activation_memory": {"mode": mode}})
        for layout in layouts
        for mode in ("selective", "full", "offload")
    ]


def _wide(layout: dict[str, Any]) -> dict[str, Any]:
    """As many experts as the widest of the layouts needs."""
    return {"moe": {**MOE, "num_experts": 8}} if layout.get("ep", 1) > 4 else {}


def draw(seed: int, ranks: int, *, compile: str = "off") -> Case:
    """A legal case by chance: layout, engine, schedule, packing, accumulation, clipping, ties, cuts, recomputation."""
    chance = random.Random(seed)
    while True:
        drawn = _draw_once(chance, ranks)
        case = replace(drawn, train={**drawn.train, "compile": compile})
        config = small_config(**{**SHAPE, **({"moe": MOE} if case.moe else {}), **case.model})
        train = TrainConfig(**{"global_batch_size": GLOBAL_BATCH, "precision": "fp32", **case.train})
        demands = layout_demands(config, train, seq_len=SEQ_LEN, device="cpu")
        if not layout_problems(ParallelConfig(**case.parallel), demands, ranks):
            return case


def _draw_once(chance: random.Random, ranks: int) -> Case:
    degrees = dict.fromkeys(("pp", "dp_replicate", "cp", "tp"), 1)
    left = ranks
    while left > 1:
        axis = chance.choice([*degrees, "dp_shard"])
        if axis != "dp_shard":
            degrees[axis] *= 2
        left //= 2
    parallel: dict[str, Any] = {
        **degrees,
        "data_engine": chance.choice(["ddp", "fsdp2", "fsdp2"]),
        "context_method": chance.choice(METHODS),
        "pipeline_schedule": chance.choice(SCHEDULES),
        "ep": chance.choice([1, 1, 2, 4]),
        "expert_tp": chance.choice([1, 1, 2]),
    }
    if parallel["data_engine"] == "fsdp2":
        parallel["reshard_after_forward"] = chance.random() < 0.5
    if degrees["pp"] == 2 and parallel["pipeline_schedule"] in ("gpipe", "1f1b") and chance.random() < 0.5:
        parallel["pipeline_split"] = chance.choice([[1, 3], [3, 1]])
    train: dict[str, Any] = {"clip_grad_norm": chance.choice([0.05, 0.5, 1e9])}
    if chance.random() < 0.6:
        train["micro_batch_size"] = chance.choice([1, 2])
    if chance.random() < 0.4:
        train["activation_memory"] = {"mode": chance.choice(["selective", "full", "offload"])}
    if chance.random() < 0.25:
        train["optimizer"] = {"name": "muon", "lr": 1e-3, "muon_lr": 1e-3, "eps": 1e-5}
    model: dict[str, Any] = {"tie_embeddings": chance.random() < 0.3, "qk_norm": chance.random() < 0.3}
    model["num_kv_heads"] = chance.choice([1, 2, 4, 8])
    moe = chance.random() < 0.75
    if moe and chance.random() < 0.3:
        model["moe"] = {**MOE, "balance": "bias", "router_score": "sigmoid"}
    if not moe:
        parallel |= {"ep": 1, "expert_tp": 1}
    return Case(
        ranks=ranks,
        moe=moe,
        parallel=parallel,
        train=train,
        model=model,
        packed=chance.random() < 0.7,
        seed=chance.randrange(1000),
    )
