"""What ranks print, on its way to the head and into files."""

import threading
from pathlib import Path

import pytest

from launcher.jobs.agents.rank_logs import LONGEST_LINE, CappedLog, LineQueue, LineSplitter, LogWriter, as_text


def split(*parts: bytes) -> list[str]:
    """The lines of an output that comes in these parts."""
    splitter = LineSplitter()
    lines = [line for part in parts for line in splitter.feed(part)]
    return [as_text(line) for line in lines + splitter.end()]


@pytest.mark.parametrize(
    ("output", "lines"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\n\ntwo", ["one", "", "two"]),
        (b"\r 10%\r 50%\r100%\ndone\n", [" 10%", " 50%", "100%", "done"]),
        (b"windows\r\nlines\r\n", ["windows", "lines"]),
        (b"half a bar\r", ["half a bar"]),
        (b"\r\r\r", []),
        (b"\x1b[31mred\x1b[0m \x1b]0;title\x07text\ttab\n", ["red text\ttab"]),
        (b"\xff\xfe\x00\x07garbage\n", ["\ufffd\ufffd··garbage"]),
        ("Zürich 東京\n".encode(), ["Zürich 東京"]),
    ],
)
def test_output_is_cut_into_lines_however_it_comes(output: bytes, lines: list[str]) -> None:
    assert split(output) == lines
    assert split(*(output[index : index + 1] for index in range(len(output)))) == lines


def test_a_very_long_line_is_cut_and_does_not_pile_up() -> None:
    long = b"x" * (3 * LONGEST_LINE)
    cut = "x" * LONGEST_LINE + " ... (cut)"
    assert split(long + b"\nnext\n") == [cut, "next"]
    assert split(*[long] * 50, b"\nnext\n") == [cut, "next"]
    assert split(long, b"\r", b"next") == [cut, "next"]
    assert split(long) == [cut]


def test_lines_that_find_no_room_are_counted_in_their_place() -> None:
    queue = LineQueue(most_lines=3)
    for number in range(5):
        queue.add(0, f"line {number}".encode())
    queue.add(1, b"lost too")
    assert queue.take(2) == [(0, "line 0"), (0, "line 1")]
    queue.add(0, b"line 5")
    assert queue.take(100) == [
        (0, "line 2"),
        (0, "(mega: 2 lines are left out here; rank-0.log has them)"),
        (0, "line 5"),
        (1, "(mega: 1 lines are left out here; rank-1.log has them)"),
    ]
    assert not queue


def test_bytes_are_bounded_too() -> None:
    queue = LineQueue(most_bytes=1000)
    for _ in range(100):
        queue.add(0, b"x" * 100)
    assert len(queue.take(1000)) == 11


def test_a_full_log_says_so_and_keeps_the_end(tmp_path: Path) -> None:
    log = CappedLog(tmp_path / "deep" / "rank-0.log", max_bytes=100)
    log.write(b"a" * 90)
    log.write(b"b" * 20)
    full = log.path.read_bytes()
    assert full.startswith(b"a" * 90 + b"b" * 10 + b"\n(mega: this log is full, 100 bytes (launch.max_rank_log_mb)")
    log.write(b"c" * 200_000)
    log.write(b"the cause\n")
    assert log.path.read_bytes() == full
    log.close()
    rest = log.path.read_bytes().removeprefix(full)
    left_out = 10 + 200_000 + len("the cause\n") - (1 << 16)
    assert rest.startswith(f"(mega: {left_out:,} bytes are left out here)\nccc".encode())
    assert rest.endswith(b"ccc" + b"the cause\n")


def test_logs_are_written_in_the_background(tmp_path: Path) -> None:
    writer = LogWriter(lambda text: None)
    logs = [CappedLog(tmp_path / f"rank-{rank}.log", max_bytes=1000) for rank in range(3)]
    for number in range(10):
        for log in logs:
            writer.write(log, f"{number}\n".encode())
    for log in logs:
        writer.close(log)
    writer.end(timeout_s=30)
    assert [log.path.read_text() for log in logs] == ["".join(f"{number}\n" for number in range(10))] * 3


def test_a_log_that_cannot_be_written_is_told_once_and_hinders_no_other(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    writer = LogWriter(said.append)
    bad = CappedLog(tmp_path / "file" / "rank-0.log", max_bytes=1000)
    good = CappedLog(tmp_path / "rank-1.log", max_bytes=1000)
    for _ in range(3):
        writer.write(bad, b"lost\n")
        writer.write(good, b"kept\n")
    writer.end(timeout_s=30)
    assert said == [f"{bad.path}: cannot be written (File exists); the run goes on without it"]
    assert good.path.read_text() == "kept\n" * 3


def test_a_disk_that_hangs_holds_up_nobody_and_what_it_missed_is_told(tmp_path: Path) -> None:
    hangs, writes = threading.Event(), threading.Event()

    class Slow(CappedLog):
        def write(self, data: bytes) -> None:
            hangs.set()
            assert writes.wait(30)
            super().write(data)

    writer = LogWriter(lambda text: None, most_bytes=100)
    log = Slow(tmp_path / "rank-0.log", max_bytes=10_000)
    writer.write(log, b"first\n")
    assert hangs.wait(30)
    for _ in range(30):
        writer.write(log, b"123456789\n")
    writes.set()
    writer.close(log)
    writer.end(timeout_s=30)
    text = log.path.read_text()
    assert text.startswith("first\n" + "123456789\n" * 10)
    assert text.endswith("(mega: 200 bytes are left out here: this file system is too slow)\n")
