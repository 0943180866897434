"""`mega train --trace-communication`, end to end."""

from __future__ import annotations

from pathlib import Path

from tests.launcher.conftest import Mega


def test_ranks_are_traced_with_compilation_off(tiny: Path, mega_process: Mega) -> None:
    settings = ["--set", "train.steps=3", "--set", "export.format=none", "--set", "train.compile=auto"]
    ended = mega_process("train", tiny, "--ranks", "2", "--trace-communication", "--json", *settings)
    assert ended.code == 0, ended.err
    assert [(page["step"], page["agrees"]) for page in ended.json["communication"]] == [(1, True), (2, True)]
    kinds = {(row["axis"], row["kind"], row["dtype"]) for row in ended.json["communication"][0]["rows"]}
    assert ("world", "all_reduce", "int64") in kinds
    assert ("dp_replicate_dp_shard_cp", "all_reduce", "float32") in kinds
    assert "step 1 · communication of a rank: as the formulas say" in ended.err
    # What is recorded is what the user asked for, so that a start without the option is no change.
    again = mega_process("train", tiny, "--ranks", "2", "--json", *settings)
    assert "changed since the last start" not in again.err
    assert again.json["communication"] is None
