"""Files of JSON lines: torn and damaged ones are read as far as they are whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamodel.train import json_lines
from megamodel.train.json_lines import append_line, read_backwards, read_lines


def test_half_a_line_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "run" / "x.jsonl"
    for number in (1, 2):
        append_line(path, {"n": number})
    with path.open("a") as file:
        file.write('{"n": 3, "lo')
    assert list(read_lines(path)) == [{"n": 1}, {"n": 2}]
    append_line(path, {"n": 4})
    assert list(read_lines(path)) == [{"n": 1}, {"n": 2}, {"n": 4}]


def test_what_is_no_object_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"n": 1}\n\x00\x00\x00\x00\n17\n\xff\xfe{"n": 2}\n\n[3]\n{"n": 4}\n')
    assert list(read_lines(path)) == [{"n": 1}, {"n": 4}]
    assert [record for record, _ in read_backwards(path)] == [{"n": 4}, {"n": 1}]


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "absent")) == []
    assert list(read_backwards(tmp_path / "absent")) == []


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 16])
@pytest.mark.parametrize("ending", [b"\n", b"", b'\n{"n": 9, "te'])
def test_backwards_is_the_same_from_the_other_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, ending: bytes
) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", block)
    records = [{"n": number, "text": "x" * (number * 5 % 13)} for number in range(8)]
    lines = [json.dumps(record).encode() for record in records]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines) + ending)
    assert list(read_lines(path)) == records
    found = list(read_backwards(path))
    assert [record for record, _ in found] == records[::-1]
    data = path.read_bytes()
    for record, end in found:  # what is cut off there is what came after
        assert data[:end].splitlines()[-1] == json.dumps(record).encode()


def test_the_end_of_a_large_file_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 36)  # 64 GiB, none of them on the disk
    append_line(path, {"n": 1})
    assert next(read_backwards(path))[0] == {"n": 1}
