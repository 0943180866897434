"""Lists of hosts, as Open MPI, MPICH and SLURM write them."""

from pathlib import Path

import pytest

from launcher.errors import ConfigError
from launcher.jobs.hostfile import read_hostfile


def _read(tmp_path: Path, text: str) -> list[tuple[str, int | None]]:
    path = tmp_path / "hosts"
    path.write_text(text)
    return [(host.name, host.slots) for host in read_hostfile(path)]


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n0\nn1\n", [("n0", None), ("n1", None)]),
        ("# all\n\nn0 slots=4   # the first\nn1 slots=2 max_slots=8\n", [("n0", 4), ("n1", 2)]),
        ("n0:4\nn1:2", [("n0", 4), ("n1", 2)]),
        ("gpu[08-10].site.org slots=8", [("gpu08.site.org", 8), ("gpu09.site.org", 8), ("gpu10.site.org", 8)]),
        ("n[1-2,5],x3", [("n1", None), ("n2", None), ("n5", None), ("x3", None)]),
        ("n0\nn0\nn1\nn0", [("n0", 3), ("n1", None)]),
        ("10.0.0.1 slots=2\nfe80::1:2", [("10.0.0.1", 2), ("fe80::1:2", None)]),
    ],
)
def test_what_is_listed(tmp_path: Path, text: str, hosts: list[tuple[str, int | None]]) -> None:
    assert _read(tmp_path, text) == hosts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n0 slot=4", ":1: n0 slot=4: 'slot=4' is not known here; a line has the form `n0`, `n0 slots=4`"),
        ("\n^n0", ":2: ^n0: '^n0' is not the name of a host; a line has the form"),
        ("n[3-1]", "'n[3-1]' is not a range of hosts"),
        ("n0 slots=0", "a host without a slot takes no part: leave it out"),
        ("# nothing\n", "hosts: lists no host: a line has the form `n0`"),
    ],
)
def test_what_is_no_list_of_hosts_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        _read(tmp_path, text)
    assert message in str(error.value)


def test_all_bad_lines_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        _read(tmp_path, "n0 a\nn1\nn2 b")
    assert len(error.value.problems) == 2


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing: the list of hosts cannot be read: .*No such file"):
        read_hostfile(tmp_path / "missing")
