"""Counts and bytes of a step are those of the formulas, in every style, alone and composed: nothing is sent unseen."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from data_pipeline.config import DataConfig
from megamodel.train.batch import TokenBatch
from megamodel.train.build import BuiltModel, build_model, compute_dtype
from megamodel.train.callbacks.communication import CommunicationTable
from megamodel.train.communication import StepCommunication, compare
from megamodel.train.communication_data import _split_backwards
from megamodel.train.communication_facts import Expected, RunShape, expect
from megamodel.train.config import TrainConfig
from megamodel.train.job import TrainingJob, TrainingResult
from megamodel.train.optimizer import build_optimizers
from megamodel.train.run import train_in_world
from megamodel.train.run_directory import RunDirectory
from megamodel.train.step import TrainStep
from megamodel.train.trace import TRACED_STEPS, CommunicationTrace
from parallel.config import ParallelConfig, PipelineSchedule
from parallel.layout import resolve_layout
from parallel.ledger import LedgerKey, LedgerRow
from parallel.mesh import Mesh
from parallel.stages import SPLIT_BACKWARD_SCHEDULES
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.megamodel.small import MLA, MOE, random_tokens, small_config
from tests.megamodel.train.jobs import prepared, small_job
from tests.parallel.test_stages import _TORCH as TORCH_SCHEDULES
from tests.parallel.test_stages import _Stage as Stage

SEQ = 16
BATCH = 8
MOE_SECOND = {"moe": {**MOE, "first_layer": 1, "num_shared_experts": 1}}
FOUR = {"num_layers": 4}


def job_of(case: dict[str, Any]) -> TrainingJob:
    settings = {"precision": "fp32", "compile": "off", "global_batch_size": BATCH, "micro_batch_size": 2}
    return TrainingJob(
        run_directory=Path("unused"),
        seed=3,
        device="cpu",
        model=small_config(**{"vocab_size": 96, **case.get("model", {})}),
        data=DataConfig(source="text", path="unused", seq_len=SEQ, document_mask=case.get("documents", True)),
        parallel=ParallelConfig(**case.get("parallel", {})),
        train=TrainConfig(**{**settings, **case.get("train", {})}),
    )


def batches(job: TrainingJob, mesh: Mesh, rows: int) -> list[TokenBatch]:
    """The micro batches of this rank: two documents a row."""
    share = job.train.global_batch_size // mesh.layout.num_data_ranks
    tokens_BS = random_tokens(job.model, share, SEQ, seed=mesh.data_rank)
    documents_BS = (torch.arange(SEQ) >= 5).int().expand(share, -1) if job.data.document_mask else None
    whole = TokenBatch(tokens_BS=tokens_BS, labels_BS=tokens_BS.roll(-1, 1), document_ids_BS=documents_BS)
    mine = whole.share(mesh.axis("cp"))
    return [mine.rows(slice(start, start + rows)) for start in range(0, share, rows)]


def traced(world: World, case: dict[str, Any], extra: bool = False) -> list[StepCommunication]:
    """What the trace tells of the first steps; `extra` adds a collective that no formula knows."""
    job = job_of(case)
    mesh = Mesh(world, resolve_layout(job.parallel, world.world_size))
    built = build_model(job.model, job.train, job.parallel, mesh=mesh, seed=job.seed, seq_len=SEQ)
    trace = CommunicationTrace(job, step_of(built, job.train), [], first_step=1)
    for _ in range(TRACED_STEPS + 1):
        trace(
            batches(job, mesh, built.micro_batch_size),
            lr_factor=1.0,
            stop_requested=lambda: _sum_unseen(world) if extra else False,
        )
    return trace.told


def _sum_unseen(world: World) -> bool:
    return bool(world.all_reduce_sum(torch.zeros(3, dtype=torch.float64)).sum())


def step_of(built: BuiltModel, train: TrainConfig) -> TrainStep:
    optimizers = build_optimizers(
        built.data_parallel.parameters(), train.optimizer, compute_dtype(train.precision), built.mesh
    )
    return TrainStep(built, optimizers, max_norm=1.0)


def check(told: list[StepCommunication]) -> None:
    assert [page.step for page in told] == [1, 2]
    for page in told:
        wrong = [row.as_data() for row in page.rows if not row.agrees]
        assert not wrong, "\n".join(
            f"step {page.step} {row['axis']} {row['kind']} {row['dtype']}: counted {row['count']} {row['bytes']}, "
            f"expected {row['expected_count']} {row['expected_bytes']} by {row['formula']}"
            for row in wrong
        )


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "ddp": (2, {}),
    "ddp bf16 sums": (2, {"parallel": {"reduce_dtype": "bf16"}}),
    "ddp moe": (2, {"model": MOE_SECOND, "train": {"precision": "bf16"}}),
    "ddp bf16 parameters": (2, {"parallel": {"param_dtype": "bf16"}, "train": {"precision": "bf16"}}),
    "ddp buckets": (2, {"model": {"vocab_size": 9600, "tie_embeddings": True}}),
    "ddp muon": (2, {"train": {"optimizer": {"name": "muon"}}}),
    "fsdp2": (2, {"parallel": {"data_engine": "fsdp2"}}),
    "fsdp2 bf16 sums": (
        2, {"parallel": {"data_engine": "fsdp2", "reduce_dtype": "bf16"}, "model": MOE_SECOND, "train": {"precision": "bf16"}}
    ),
    "fsdp2 bf16 parameters": (
        2, {"parallel": {"data_engine": "fsdp2", "param_dtype": "bf16"}, "model": MOE_SECOND, "train": {"precision": "bf16"}}
    ),
    "fsdp2 bf16 parameters alone": (2, {"parallel": {"data_engine": "fsdp2", "param_dtype": "bf16"}}),
    "fsdp2 few experts": (
        4, {"parallel": {"data_engine": "fsdp2"}, "model": {"moe": {**MOE, "num_experts": 2, "first_layer": 1}}}
    ),
    "fsdp2 kept": (2, {"parallel": {"data_engine": "fsdp2", "reshard_after_forward": False}}),
    "fsdp2 bf16 moe": (2, {"parallel": {"data_engine": "fsdp2"}, "model": MOE_SECOND, "train": {"precision": "bf16"}}),
    "fsdp2 uneven": (3, {"parallel": {"data_engine": "fsdp2"}, "model": {"qk_norm": True}, "train": {"global_batch_size": 6}}),
    "fsdp2 muon": (2, {"parallel": {"data_engine": "fsdp2"}, "model": MOE_SECOND, "train": {"optimizer": {"name": "muon"}}}),
    "fsdp2 one micro batch": (2, {"parallel": {"data_engine": "fsdp2"}, "train": {"micro_batch_size": 4}}),
    "replicated": (2, {"parallel": {"data_engine": "fsdp2", "dp_replicate": 2}}),
    "tp": (2, {"parallel": {"tp": 2}}),
    "tp bf16 moe": (2, {"parallel": {"tp": 2}, "model": MOE_SECOND, "train": {"precision": "bf16"}}),
    "tp moe alone": (2, {"parallel": {"tp": 2}, "model": {"moe": MOE}}),
    "tp mla tied": (2, {"parallel": {"tp": 2}, "model": {"mla": MLA, "tie_embeddings": True}}),
    "tp4 with copies": (4, {"parallel": {"tp": 4}, "train": {"optimizer": {"name": "muon"}}}),
    "cp gather": (2, {"parallel": {"cp": 2}, "model": MOE_SECOND}),
    "cp gather plain": (2, {"parallel": {"cp": 2}, "documents": False}),
    "cp ring plain": (2, {"parallel": {"cp": 2, "context_method": "ring"}, "documents": False}),
    "cp ring": (2, {"parallel": {"cp": 2, "context_method": "ring"}, "train": {"precision": "bf16"}}),
    "cp ulysses": (2, {"parallel": {"cp": 2, "context_method": "ulysses"}, "model": {"mla": MLA}}),
    "cp4 ring": (4, {"parallel": {"cp": 4, "context_method": "ring"}}),
    "cp4 ulysses": (4, {"parallel": {"cp": 4, "context_method": "ulysses"}}),
    "ep": (2, {"parallel": {"ep": 2}, "model": MOE_SECOND}),
    "expert tp": (2, {"parallel": {"expert_tp": 2}, "model": {"moe": {**MOE, "d_ff": 32}}, "train": {"precision": "bf16"}}),
    "ep tp fsdp2": (4, {"parallel": {"ep": 2, "tp": 2, "data_engine": "fsdp2"}, "model": MOE_SECOND}),
    "ep fsdp2 muon": (
        4, {"parallel": {"ep": 2, "data_engine": "fsdp2"}, "model": MOE_SECOND, "train": {"optimizer": {"name": "muon"}}}
    ),
    "tp cp fsdp2 muon": (
        4, {"parallel": {"tp": 2, "cp": 2, "data_engine": "fsdp2"}, "train": {"optimizer": {"name": "muon"}}}
    ),
    "tp ddp": (4, {"parallel": {"tp": 2}, "model": MOE_SECOND}),
    "recomputed": (
        4, {"parallel": {"tp": 2, "cp": 2}, "model": MOE_SECOND, "train": {"activation_memory": {"mode": "full"}}}
    ),
    "recomputed ring": (
        2, {"parallel": {"cp": 2, "context_method": "ring"}, "train": {"activation_memory": {"mode": "selective"}}}
    ),
    "every second recomputed": (
        2, {"parallel": {"tp": 2}, "train": {"activation_memory": {"mode": "full", "every_n_layers": 2}}}
    ),
    "selective": (2, {"parallel": {"tp": 2}, "train": {"activation_memory": {"mode": "selective"}}}),
    "selective without collectives": (
        2, {"parallel": {"tp": 2}, "train": {"activation_memory": {"mode": "selective", "save": ["matmul"]}}}
    ),
    "recomputed ep": (
        2, {"parallel": {"ep": 2}, "model": MOE_SECOND, "train": {"activation_memory": {"mode": "full"}}}
    ),
    "pp": (2, {"parallel": {"pp": 2}}),
    "pp gpipe": (2, {"parallel": {"pp": 2, "pipeline_schedule": "gpipe"}, "model": MOE_SECOND}),
    "pp tied": (2, {"parallel": {"pp": 2}, "model": {"tie_embeddings": True}}),
    "pp interleaved": (2, {"parallel": {"pp": 2, "pipeline_schedule": "interleaved_1f1b"}, "model": FOUR}),
    "pp zero bubble": (2, {"parallel": {"pp": 2, "pipeline_schedule": "interleaved_zero_bubble"}, "model": FOUR}),
    "pp zbv": (2, {"parallel": {"pp": 2, "pipeline_schedule": "zbv"}, "model": {**FOUR, "tie_embeddings": True}}),
    "pp dualpipev": (2, {"parallel": {"pp": 2, "pipeline_schedule": "dualpipev"}, "model": FOUR}),
    "pp fsdp2": (4, {"parallel": {"pp": 2, "data_engine": "fsdp2"}, "train": {"micro_batch_size": 1}}),
    "pp fsdp2 kept": (
        4, {"parallel": {"pp": 2, "data_engine": "fsdp2", "reshard_after_forward": False}, "train": {"micro_batch_size": 1}}
    ),
    "pp zbv fsdp2": (
        4, {"parallel": {"pp": 2, "data_engine": "fsdp2", "pipeline_schedule": "zbv"}, "model": FOUR,
            "train": {"micro_batch_size": 1}}
    ),
    "pp dualpipev fsdp2": (
        4, {"parallel": {"pp": 2, "data_engine": "fsdp2", "pipeline_schedule": "dualpipev"}, "model": FOUR,
            "train": {"micro_batch_size": 1}}
    ),
    "pp tp": (4, {"parallel": {"pp": 2, "tp": 2}, "model": MOE_SECOND}),
    "pp cp": (4, {"parallel": {"pp": 2, "cp": 2, "context_method": "ring"}}),
    "pp ep": (4, {"parallel": {"pp": 2, "ep": 2}, "model": {"moe": MOE}, "train": {"micro_batch_size": 1}}),
    "pp tp cp": (8, {"parallel": {"pp": 2, "tp": 2, "cp": 2}, "model": {"moe": MOE}}),
    "hybrid": (4, {"parallel": {"data_engine": "fsdp2", "dp_replicate": 2}, "model": MOE_SECOND}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_byte_is_explained(gloo_ranks: GlooPool, name: str) -> None:
    ranks, case = CASES[name]
    for told in gloo_ranks(ranks, traced, case):
        check(told)


def test_a_collective_that_no_formula_knows_shows(gloo_ranks: GlooPool) -> None:
    for told in gloo_ranks(2, traced, {"parallel": {"data_engine": "fsdp2"}}, True):
        for page in told:
            assert not page.agrees
            wrong = [row for row in page.rows if not row.agrees]
            assert [(row.key.axis, row.key.kind, row.key.dtype) for row in wrong] == [
                ("world", "all_reduce", "float64")
            ]
            assert wrong[0].count.most == wrong[0].expected_count.most + 1
            assert wrong[0].num_bytes.most == wrong[0].expected_bytes.most + 3 * 8


def page(*rows: tuple[str, int, int]) -> list[LedgerRow]:
    return [LedgerRow(key=LedgerKey(axis="tp", kind=k, dtype="float32"), count=c, num_bytes=n) for k, c, n in rows]


def due(kind: str, count: int, elements: int, **options: Any) -> Expected:
    return expect("tp", kind, "float32", count=count, elements=elements, purpose="x", formula="n", **options)


@pytest.mark.parametrize("schedule", SPLIT_BACKWARD_SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_backwards_are_split_as_often_as_torchs_order_splits_them(schedule: PipelineSchedule, pp: int) -> None:
    parallel = ParallelConfig(pp=pp, dp_shard=1, pipeline_schedule=schedule)
    job = job_of({"model": {"num_layers": 2 * pp}, "train": {"global_batch_size": 12, "micro_batch_size": 1}})
    shape = RunShape(
        model=job.model, layout=resolve_layout(parallel, pp), parallel=parallel, train=job.train, seq_len=SEQ, rows=1,
        document_mask=True,
    )  # fmt: skip
    stages = [Stage(index, 2 * pp, pp) for index in shape.stages_of(0)]
    order = TORCH_SCHEDULES[schedule](stages, 12, loss_fn=lambda output, target: output).pipeline_order
    actions = [part for acts in order.values() for action in acts if action for part in action.sub_actions or (action,)]
    split = Counter(action.stage_index for action in actions if action.computation_type.name == "BACKWARD_WEIGHT")
    assert {stage: _split_backwards(shape, stage) for stage in range(2 * pp)} == split


def test_equal_sums_of_unequal_ranks_are_no_agreement() -> None:
    both = [[due("send", 2, 6)], [due("send", 2, 6)]]
    assert compare([page(("send", 2, 24)), page(("send", 2, 24))], both)[0].agrees
    assert not compare([page(("send", 2, 20)), page(("send", 2, 28))], both)[0].agrees
    assert not compare([page(("send", 1, 24)), page(("send", 3, 24))], both)[0].agrees


def test_rows_that_depend_on_the_data_agree_in_their_sum() -> None:
    both = [[due("all_to_all", 2, 6, on_average=True)]] * 2
    assert compare([page(("all_to_all", 2, 20)), page(("all_to_all", 2, 28))], both)[0].agrees
    assert not compare([page(("all_to_all", 2, 20)), page(("all_to_all", 2, 24))], both)[0].agrees
    assert not compare([page(("all_to_all", 1, 20)), page(("all_to_all", 3, 28))], both)[0].agrees


def test_what_is_missing_or_unknown_is_a_row() -> None:
    missing, unknown = compare([page(("send", 1, 4))], [[due("recv", 1, 1)]])
    assert (missing.key.kind, missing.count.total, missing.expected_count.total) == ("recv", 0, 1)
    assert (unknown.key.kind, unknown.count.total, unknown.expected_count.total) == ("send", 1, 0)
    assert unknown.terms == ()
    assert not missing.agrees
    assert not unknown.agrees


def test_an_engine_without_formulas_is_counted_alone() -> None:
    (row,) = compare([page(("send", 2, 24))], [None])
    assert (row.agrees, row.count.total, row.expected_count.total) == (None, 2, 0)
    assert StepCommunication(step=1, rows=(row,)).agrees is None


def train_traced(world: World, job: TrainingJob) -> tuple[TrainingResult, str]:
    console = Console(file=io.StringIO())
    result = train_in_world(job.traced(), prepared(job), world, console=console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_traced_run_tells_people_and_programs(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = small_job(tmp_path, engine="fsdp2", steps=3, validation={"every_steps": 1}, checkpoint={"every_steps": 1})
    prepared(job)
    (result, text), (other, silence) = gloo_ranks(2, train_traced, job)
    assert [page.step for page in result.communication] == [1, 2]
    assert all(page.agrees for page in result.communication)  # neither validation nor saving is in it
    assert other.communication == result.communication
    assert silence == ""
    assert "step 1 · communication of a rank: as the formulas say" in text
    assert "step 2 · communication of a rank: as the formulas say" in text
    assert "parameters of each block: 2 * M * sum(N * ceil(d / N) * n / d) * w" in text
    events = [json.loads(line) for line in RunDirectory(job.run_directory).events.read_text().splitlines()]
    traces = [event for event in events if event["event"] == "communication"]
    assert [event["step"] for event in traces] == [1, 2]
    gathers = next(row for row in traces[0]["rows"] if row["kind"] == "all_gather" and row["axis"] == "dp_shard_cp")
    assert gathers["count"] == gathers["expected_count"]
    assert gathers["bytes"]["least"] > 0


def test_the_table_names_what_differs() -> None:
    console = Console(file=io.StringIO(), width=60)
    rows = compare([page(("recv", 2, 2400), ("send", 1, 4))] * 2, [[due("recv", 2, 500)], [due("recv", 2, 600)]])
    CommunicationTable(console).on_event("communication", **StepCommunication(step=7, rows=rows).as_data())
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "step 7 · communication of a rank: NOT as the formulas say",
        "  tp  recv  float32  2 x  2,400 bytes  EXPECTED 2 x, 2,000 to 2,400 bytes",
        "      x: n",
        "  tp  send  float32  1 x      4 bytes  EXPECTED 0 x, 0 bytes",
        "      no formula knows this communication",
        "  (bytes are payload; symbols: docs/communication.md)",
    ]
