"""`mega train --simulate-world`: the published shapes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.conftest import Mega

CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama3-405b", 405_853_388_800), ("deepseek-v3", 671_026_404_352)], ids=str
)
def test_the_largest_models_on_the_largest_machines(name: str, parameters: int, mega_process: Mega) -> None:
    ended = mega_process("train", CONFIGS / f"{name}.toml", "--simulate-world", "16384", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["num_parameters"] == parameters
    memory = ended.json["memory"]
    assert memory["parameters"] == ended.json["built_parameter_bytes"]
    assert memory["parameters"] < memory["peak"] < 80 * 2**30
    assert len(ended.json["stages"]) == 16
    assert max(stage["peak"] for stage in ended.json["stages"]) < 80 * 2**30
    assert ended.json["host_bytes"] < 3e9
    assert ended.json["seconds"] > 0


def test_people_read_a_table(tiny: Path, mega_process: Mega) -> None:
    ended = mega_process("train", tiny, "--simulate-world", "4", "--simulate-rank", "3")
    assert ended.code == 0, ended.err
    for word in ("on 4 ranks: dp_shard 4", "rank 3 (dp_shard 3)", "optimizer", "activations", "peak"):
        assert word in ended.out
    assert not (tiny.parent / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--simulate-rank", "1"], "give --simulate-world N too"),
        (["--simulate-world", "4", "--simulate-rank", "4"], "ranks of a world of 4 count from 0 to 3"),
        (["--simulate-world", "3", "--set", "parallel.tp=2"], "--simulate-world"),
        (["--simulate-world", "4", "--ranks", "2", "--dry-run"], "so --ranks, --dry-run means nothing beside it"),
    ],
)
def test_refusals(tiny: Path, mega: Mega, arguments: list[str], message: str) -> None:
    ended = mega("train", tiny, *arguments)
    assert ended.code == 2
    assert message in ended.err


def test_a_rank_of_a_run_simulates_nothing(tiny: Path, mega: Mega, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    ended = mega("train", tiny, "--simulate-world", "4")
    assert ended.code == 2
    assert "start it without torchrun" in ended.err
