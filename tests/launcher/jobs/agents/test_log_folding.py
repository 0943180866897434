"""Folding lines of many ranks. Time is what the test says it is."""

import random
from collections.abc import Iterable

import pytest

from launcher.jobs.agents.log_folding import Folder, ranges


def fold(lines: Iterable[tuple[int, str]], *, num_ranks: int = 4) -> list[str]:
    """What becomes of lines that come at the same moment."""
    written: list[str] = []
    folder = Folder(written.append, num_ranks=num_ranks)
    for rank, text in lines:
        folder.add(rank, text, 0.0)
    folder.close()
    return written


def test_the_same_line_of_all_ranks_is_one_and_does_not_wait() -> None:
    written: list[str] = []
    folder = Folder(written.append, num_ranks=1024)
    for rank in range(1024):
        assert not written
        folder.add(rank, "ready", 0.0)
    assert written == ["[0-1023] ready"]


def test_lines_of_some_ranks_wait_for_the_window() -> None:
    written: list[str] = []
    folder = Folder(written.append, num_ranks=4, window_s=0.3)
    folder.add(2, "late?", 10.0)
    folder.add(0, "late?", 10.2)
    folder.flush(10.29)
    assert written == []
    folder.flush(10.3)
    folder.add(1, "late?", 10.31)
    folder.close()
    assert written == ["[0,2] late?", "[1] late?"]


def test_a_job_of_one_rank_has_no_prefix() -> None:
    assert fold([(0, "one"), (0, "one"), (0, "two")], num_ranks=1) == ["one", "one", "two"]


def test_lines_stand_in_the_order_in_which_they_were_first_said() -> None:
    assert fold([(3, "b"), (1, "a"), (2, "b"), (2, "a"), (0, "c")]) == ["[2-3] b", "[1-2] a", "[0] c"]


def test_two_equal_lines_of_a_rank_are_two() -> None:
    assert fold([(0, "x"), (0, "x"), (1, "x"), (1, "x"), (2, "x")]) == ["[0-2] x", "[0-1] x"]


def test_blocks_fold_line_by_line_though_their_lines_repeat() -> None:
    block = ["Traceback:", "  in step", "    ^^^^", "  in step", "    ^^^^", "ValueError"]
    together = [(rank, line) for line in block for rank in range(3)]
    one_by_one = [(rank, line) for rank in range(3) for line in block]
    assert fold(together) == fold(one_by_one) == [f"[0-2] {line}" for line in block]


def test_no_line_moves_before_what_its_rank_said_earlier() -> None:
    assert fold([(0, "a"), (0, "b"), (1, "b"), (1, "a")]) == ["[0] a", "[0-1] b", "[1] a"]


@pytest.mark.parametrize(
    "line", ["rank {} is ready", "[rank{}]: is ready", "Rank={} is ready", "see logs/rank-{}.log", "rank: {}/4"]
)
def test_a_ranks_own_number_does_not_hinder(line: str) -> None:
    assert fold((rank, line.format(rank)) for rank in (1, 2)) == [f"[1-2] {line.format('N')}"]
    assert fold([(2, line.format(2))]) == [f"[2] {line.format(2)}"]


def test_another_ranks_number_is_kept() -> None:
    assert fold((rank, "rank 1 is silent") for rank in range(4)) == ["[0-3] rank 1 is silent"]
    assert fold([(0, "rank 1 is silent"), (2, "rank 3 is silent")]) == ["[0] rank 1 is silent", "[2] rank 3 is silent"]
    assert fold([(0, "local_rank 0"), (1, "local_rank 1")]) == ["[0] local_rank 0", "[1] local_rank 1"]


def test_who_speaks_of_rank_0_and_who_of_itself_are_not_mixed() -> None:
    of_rank_0_first = [(0, "rank 0 leads"), (1, "rank 0 leads"), (2, "rank 2 leads")]
    assert fold(of_rank_0_first) == ["[0-1] rank 0 leads", "[2] rank 2 leads"]
    of_itself_first = [(0, "rank 0 leads"), (2, "rank 2 leads"), (1, "rank 0 leads")]
    assert fold(of_itself_first) == ["[0,2] rank N leads", "[1] rank 0 leads"]


def test_the_time_with_which_libraries_begin_a_line_does_not_hinder() -> None:
    lines = [(rank, f"[W731 12:00:00.{rank}45 socket.cpp:20] retrying, rank {rank}") for rank in (1, 2)]
    assert fold(lines) == ["[1-2] [W731 12:00:00.145 socket.cpp:20] retrying, rank N"]
    assert fold([(0, "step 1 at 12:00:00"), (1, "step 1 at 12:00:01")]) == [
        "[0] step 1 at 12:00:00",
        "[1] step 1 at 12:00:01",
    ]


def test_ranges_are_short() -> None:
    assert ranges(0b1) == "0"
    assert ranges(0b10110111) == "0-2,4-5,7"
    assert ranges(sum(1 << rank for rank in range(0, 1024, 2))) == "0,2,4,6,8,10,12,14,... 512 ranks"


def test_what_waits_is_bounded() -> None:
    written: list[str] = []
    folder = Folder(written.append, num_ranks=2)
    for number in range(50_000):
        folder.add(0, f"line {number}", 0.0)
    assert len(written) >= 50_000 - 20_000
    for number in range(20):
        folder.add(0, f"{number}" * 500_000, 0.0)
    assert sum(map(len, written)) > 2_000_000
    folder.close()
    assert written[:2] == ["[0] line 0", "[0] line 1"]
    assert len(written) == 50_020


def test_equal_lines_without_end_cost_no_more_each() -> None:
    """Twenty thousand equal lines wait; were they looked through one by one, this would take minutes."""
    written: list[str] = []
    folder = Folder(written.append, num_ranks=3)
    for rank in (0, 1):
        for _ in range(20_000):
            folder.add(rank, "y", 0.0)
    folder.close()
    assert written == ["[0-1] y"] * 20_000


@pytest.mark.parametrize("seed", range(20))
def test_every_line_of_every_rank_comes_once_and_in_order(seed: int) -> None:
    chance = random.Random(seed)
    said = {rank: [chance.choice("abcd") for _ in range(chance.randrange(30))] for rank in range(6)}
    written: list[str] = []
    folder = Folder(written.append, num_ranks=6, window_s=3.0)
    left = {rank: list(lines) for rank, lines in said.items()}
    now = 0.0
    while any(left.values()):
        rank = chance.choice([rank for rank, lines in left.items() if lines])
        folder.add(rank, left[rank].pop(0), now)
        now += chance.random()
        folder.flush(now)
    folder.close()
    heard: dict[int, list[str]] = {rank: [] for rank in said}
    for line in written:
        for rank in _ranks(line[1 : line.index("]")]):
            heard[rank].append(line[-1])
    assert heard == said


def _ranks(text: str) -> list[int]:
    ends = [part.split("-") for part in text.split(",")]
    return [rank for each in ends for rank in range(int(each[0]), int(each[-1]) + 1)]
