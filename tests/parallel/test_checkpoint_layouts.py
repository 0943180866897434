"""What is saved under one layout and loaded under another is the same to the bit, and nothing is written twice."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from parallel.checkpoint.directory import CheckpointDirectory
from parallel.checkpoint.pieces import Box
from parallel.checkpoint.shares import Claim, assign_writers
from parallel.checkpoint.store import CheckpointStore
from parallel.checkpoint.training_state import load_training_state, model_tensors, training_state
from parallel.errors import CheckpointError
from parallel.layout import Layout
from parallel.mesh import Mesh, single_axis
from parallel.placement import Cut, Piece, Placement
from parallel.world import World, open_world
from tests.gloo_pool import GlooPool

EMBEDDING = {"embed.weight": (12, 5)}
FIRST = {"layers.0.q": (8, 5), "layers.0.k": (4, 5), "layers.0.o": (5, 8), "layers.0.norm": (5,)}
SECOND = {"layers.1.experts.w": (4, 3, 6), "layers.1.gate": (1,), "layers.1.load": (5,)}
BUFFERS = ("layers.1.load",)
KV_PARTS = 2
"""Fewer than the largest tensor parallel degree here: neighbours then hold the same part of `k`."""


@dataclass(frozen=True)
class Case:
    """One way to spread the model. `v_shaped`: the first pipeline rank holds the first and the last stage."""

    layout: Layout
    fsdp: bool = False
    v_shaped: bool = False


CASES = {
    "one": Case(Layout()),
    "ddp2": Case(Layout(dp_replicate=2)),
    "fsdp2": Case(Layout(dp_shard=2), fsdp=True),
    "hsdp4": Case(Layout(dp_replicate=2, dp_shard=2), fsdp=True),
    "tp4": Case(Layout(tp=4, ep=4)),
    "tp2-fsdp2": Case(Layout(dp_shard=2, tp=2, ep=2, expert_tp=2), fsdp=True),
    "pp2-tp2": Case(Layout(pp=2, tp=2, ep=2)),
    "pp2-v": Case(Layout(pp=2), v_shaped=True),
    "pp2-fsdp2-tp2": Case(Layout(pp=2, dp_shard=2, tp=2, ep=2), fsdp=True),
}


class Part(nn.Module):
    """Parameters and buffers under dotted names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            home: nn.Module = self
            for step in path:
                if not hasattr(home, step):
                    home.add_module(step, nn.Module())
                home = getattr(home, step)
            if name in BUFFERS:
                home.register_buffer(last, tensor.clone())
            else:
                home.register_parameter(last, nn.Parameter(tensor.clone()))


def whole(name: str, entry: str = "") -> Tensor:
    """What a tensor of the model, or of its optimizer, is in all layouts."""
    shape = {**EMBEDDING, **FIRST, **SECOND}[name]
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name}/{entry}".encode())))


def placements_on(mesh: Mesh) -> dict[str, Placement]:
    tp, ep, expert_tp = mesh.axis("tp"), mesh.axis("ep"), mesh.axis("expert_tp")
    kv_parts = min(KV_PARTS, tp.size)
    cuts = {
        "embed.weight": [Cut(dim=0, parts=tp.size, index=tp.rank, axis=tp)],
        "layers.0.q": [Cut(dim=0, parts=tp.size, index=tp.rank, axis=tp)],
        "layers.0.k": [Cut(dim=0, parts=kv_parts, index=tp.rank * kv_parts // tp.size, axis=tp)],
        "layers.0.o": [Cut(dim=1, parts=tp.size, index=tp.rank, axis=tp)],
        "layers.1.experts.w": [
            Cut(dim=0, parts=ep.size, index=ep.rank, axis=ep),
            Cut(dim=2, parts=expert_tp.size, index=expert_tp.rank, axis=expert_tp),
        ],
    }
    return {name: Placement(shape=whole(name).shape, cuts=tuple(cut)) for name, cut in cuts.items()}


def cut_out(tensor: Tensor, placement: Placement | None) -> Tensor:
    for cut in placement.cuts if placement else ():
        tensor = tensor.chunk(cut.parts, cut.dim)[cut.index]
    return tensor


@dataclass
class Spread:
    """The model and its optimizer on one rank."""

    parts: list[nn.Module]
    placements: dict[str, Placement]
    optimizer: torch.optim.Optimizer

    def named(self) -> list[tuple[str, Tensor]]:
        return [entry for part in self.parts for entry in [*part.named_parameters(), *part.named_buffers()]]


def spread(world: World, case: Case, value_of: Callable[[str], Tensor]) -> Spread:
    """The model on the ranks of a layout, with the tied embedding on the first and the last stage."""
    # A process of the pool sees many worlds. torch remembers shardings by the numbers of the ranks, with their groups,
    # and would answer with those of a world that is gone.
    _clear_sharding_prop_cache()
    mesh = Mesh(world, case.layout)
    placements = placements_on(mesh)
    if case.layout.pp == 1:
        stages = [{**EMBEDDING, **FIRST, **SECOND}]
    elif case.v_shaped:
        stages = [[{**EMBEDDING, **FIRST}, EMBEDDING], [SECOND]][mesh.coordinate("pp")]
    else:
        stages = [[{**EMBEDDING, **FIRST}, {**SECOND, **EMBEDDING}][mesh.coordinate("pp")]]
    parts: list[nn.Module] = []
    for names in stages:
        part = Part({name: cut_out(value_of(name), placements.get(name)) for name in names})
        if case.fsdp:
            if "layers.1.experts.w" in names:
                experts = part.get_submodule("layers.1.experts")
                fully_shard(experts, mesh=mesh.device_mesh(("dp_replicate",), ("edp_shard",)))
            fully_shard(part, mesh=mesh.device_mesh(("dp_replicate",), ("dp_shard", "cp")))
        parts.append(part)
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()])
    return Spread(parts=parts, placements=placements, optimizer=optimizer)


def save(world: World, root: Path, case: Case, asynchronous: bool) -> int:
    """Gives the bytes that this rank has copied for it (an asynchronous save)."""
    model = spread(world, case, whole)
    for name, parameter in model.named():
        if name in BUFFERS:
            continue
        entries: dict[str, Tensor] = {"step": torch.tensor(7.0)}
        for entry in ("exp_avg", "exp_avg_sq"):
            entries[entry] = cut_out(whole(name, entry), model.placements.get(name)).clone()
            if isinstance(parameter, DTensor):
                entries[entry] = distribute_tensor(
                    entries[entry], parameter.device_mesh, parameter.placements, src_data_rank=None
                )
        model.optimizer.state[parameter] = entries
    with CheckpointStore(root, world) as store:
        store.overlap_with([model.optimizer])
        state = training_state(model_tensors(model.parts, model.placements), [model.optimizer])
        store.save(7, {**state, "note": ["plain", 1]}, metadata={}, asynchronous=asynchronous).wait()
        return sum(buffer.nbytes for buffer in store._buffers._buffers.values())


def load_and_compare(world: World, root: Path, case: Case) -> int:
    """Loads into a model of zeros; gives how many tensors were compared with what they must be."""
    model = spread(world, case, lambda name: torch.zeros_like(whole(name)))
    with CheckpointStore(root, world) as store:
        info = store.latest()
        assert info is not None
        tensors = model_tensors(model.parts, model.placements)
        loaded = load_training_state(store, info, tensors, [model.optimizer], others={"note": None})
        assert loaded.state == {"note": ["plain", 1]}
    compared = 0
    for name, tensor in model.named():
        entries = {} if name in BUFFERS else model.optimizer.state[tensor]
        assert name in BUFFERS or entries["step"].item() == 7.0
        for entry, value in {"": tensor, **entries}.items():
            if entry != "step":
                assert isinstance(value, DTensor) == (case.fsdp and name not in BUFFERS)
                local = value.full_tensor() if isinstance(value, DTensor) else value
                assert torch.equal(local, cut_out(whole(name, entry), model.placements.get(name))), (name, entry)
                compared += 1
    return compared


def on(gloo_ranks: GlooPool, case: Case, function: Callable[..., Any], *args: Any) -> list[Any]:
    if case.layout.world_size == 1:
        with open_world(device="cpu", timeout_seconds=60, rendezvous_timeout_seconds=60) as world:
            return [function(world, *args)]
    return gloo_ranks(case.layout.world_size, function, *args)


def bytes_and_entries_in_files(path: Path) -> tuple[int, int]:
    """Bytes of tensors in a checkpoint's files, each read for itself, and how many there are. Checks that the files
    hold nothing besides."""
    reader = FileSystemReader(path)
    storage = reader.read_metadata().storage_data
    assert sum(info.length for info in storage.values()) == sum(f.stat().st_size for f in path.glob("*.distcp"))
    num_bytes = num_tensors = 0
    for info in storage.values():
        with open(path / info.relative_path, "rb") as stream:
            tensor = torch.load(reader._slice_file(stream, info), weights_only=False)
        if isinstance(tensor, Tensor):
            assert tensor.numel(), "an empty part was written"
            num_bytes += tensor.untyped_storage().nbytes()
            num_tensors += 1
    return num_bytes, num_tensors


CROSSINGS = [
    ("tp4", "one"),
    ("one", "hsdp4"),
    ("pp2-tp2", "tp2-fsdp2"),
    ("tp2-fsdp2", "pp2-fsdp2-tp2"),
    ("pp2-fsdp2-tp2", "fsdp2"),
    ("hsdp4", "pp2-v"),
    ("pp2-v", "tp4"),
    ("fsdp2", "pp2-tp2"),
    ("ddp2", "tp4"),
]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("saver", "loader"), CROSSINGS)
def test_all_that_was_saved_is_loaded_bit_for_bit(
    gloo_ranks: GlooPool, tmp_path: Path, saver: str, loader: str, asynchronous: bool
) -> None:
    on(gloo_ranks, CASES[saver], save, tmp_path, CASES[saver], asynchronous)
    compared = on(gloo_ranks, CASES[loader], load_and_compare, tmp_path, CASES[loader])
    assert sum(compared) == _num_tensors_of_all_ranks(CASES[loader])


def _num_tensors_of_all_ranks(case: Case) -> int:
    """Three for a parameter, one for a buffer, on each rank that holds it."""
    per_column = 3 * (len(EMBEDDING) + len(FIRST) + len(SECOND)) - 2 * len(BUFFERS)
    if case.layout.pp > 1:
        per_column += 3 * len(EMBEDDING)  # the tied one
    return per_column * case.layout.world_size // case.layout.pp


@pytest.mark.parametrize("saver", ["one", "ddp2", "hsdp4", "tp4", "pp2-tp2", "pp2-v", "tp2-fsdp2"])
def test_every_byte_is_copied_and_written_once(gloo_ranks: GlooPool, tmp_path: Path, saver: str) -> None:
    copied = on(gloo_ranks, CASES[saver], save, tmp_path, CASES[saver], True)
    (info,) = CheckpointDirectory(tmp_path).list()
    parameters = [name for name in (*EMBEDDING, *FIRST, *SECOND) if name not in BUFFERS]
    steps = 4 * len(parameters)
    expected = sum(3 * whole(name).nbytes for name in parameters) + sum(whole(name).nbytes for name in BUFFERS) + steps
    num_bytes, num_tensors = bytes_and_entries_in_files(info.path)
    assert num_bytes == expected
    assert sum(copied) == expected
    assert max(copied) <= 1.2 * expected / len(copied) + max(whole(name).nbytes for name in parameters)
    if saver in ("one", "ddp2", "pp2-v"):
        assert num_tensors == 4 * len(parameters) + len(BUFFERS)
    if saver == "tp4":  # q, o, experts and the embedding in four parts, k in two, the rest whole
        assert num_tensors == 3 * (4 * 4 + 2 + 2) + len(parameters) + len(BUFFERS)


def test_boxes_with_few_holders_are_given_out_before_those_with_many() -> None:
    large, small = Claim(num_bytes=100_000), Claim(num_bytes=50_000)
    own = [{Box("own", (rank,), (1,)): small for rank in range(2)}, {}]
    shared = {Box("shared"): large}
    shares = assign_writers([own[0] | shared, own[1] | shared])
    assert shares == [set(own[0]), set(shared)]


def _save_pieces(world: World, root: Path, pieces: Mapping[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught, CheckpointStore(root, world) as store:
        store.save(1, {"model": pieces}, metadata={}, asynchronous=True)
    return str(caught.value)


def refusals(world: World, root: Path) -> list[str]:
    axis = single_axis("tp")

    def half(index: int, dim: int = 0) -> Piece:
        placement = Placement(shape=torch.Size((4, 6)), cuts=(Cut(dim=dim, parts=2, index=index, axis=axis),))
        return Piece(local=torch.ones(placement.local_shape), shape=placement.shape, offsets=placement.offsets)

    good = half(world.rank)
    return [
        _save_pieces(world, root, {"good": good, "w": half(0)}),
        _save_pieces(world, root, {"good": good, "w": torch.ones(4, 6) if world.rank else half(0)}),
        _save_pieces(world, root, {"good": good, "w": torch.ones(4, 6 + world.rank)}),
        _save_pieces(world, root, {"good": good, "w": half(world.rank, dim=world.rank)}),
    ]


def test_what_the_ranks_do_not_hold_all_of_is_refused_by_name(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    for missing, twice, disagreeing, crossed in gloo_ranks(2, refusals, tmp_path):
        assert "model.w [4, 6]: the ranks hold 12 of 24 elements" in missing
        assert "model.w [4, 6]: its parts overlap, 36 of 24 elements" in twice
        assert "model.w has not the same shape and type on all ranks" in disagreeing
        assert "key:model.w has overlapping chunks" in crossed
        assert not any("model.good" in message for message in (missing, twice, disagreeing, crossed))
    assert CheckpointDirectory(tmp_path).list() == ()


def save_by_one_rank_each(world: World, root: Path) -> None:
    """As an engine that gathers whole tensors does it: each of them is on one rank alone."""
    state = {"model": {f"w{world.rank}": torch.full((3, 2), float(world.rank))}, "empty": torch.zeros(0, 4)}
    with CheckpointStore(root, world) as store:
        store.save(1, state, metadata={}, asynchronous=True)


def load_all(world: World, root: Path) -> list[float]:
    with CheckpointStore(root, world) as store:
        info = store.latest()
        assert info is not None
        wanted = {"model": {f"w{rank}": torch.zeros(3, 2) for rank in range(2)}, "empty": torch.zeros(0, 4)}
        state = store.load(info, wanted).state
        return [tensor.mean().item() for tensor in state["model"].values()]


def test_a_whole_tensor_may_be_on_one_rank_alone(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    gloo_ranks(2, save_by_one_rank_each, tmp_path)
    assert gloo_ranks(3, load_all, tmp_path) == [[0.0, 1.0]] * 3
