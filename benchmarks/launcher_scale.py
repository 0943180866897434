"""What a job of 1,024 ranks on 128 hosts asks of its head: to bring agents together, start ranks, fold their lines, see them end.

    python benchmarks/launcher_scale.py

All on this machine: 128 agents (`mega agent`) as if each were a host, and ranks that are shells without torch. They print
a traceback of 30 lines all at once, then end. The head is a process of its own, so that its memory can be told. Beside it
the same processes without a head or agents: interpreters that load the same code and start as many shells.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reporting import add_output_options, report

BOUND_S, BOUND_BYTES = 30.0, 10**9
LINES_A_RANK = 30
REPOSITORY = Path(__file__).resolve().parent.parent
_TOKEN = "benchmark"
# All wait for a line of the pipe, each for its own, then speak at once, as ranks do that lose one another.
_RANK = '[ -z "$1" ] || read _ < "$1"; i=0; while [ $i -lt $2 ]; do echo "[rank$RANK]: frame $i"; i=$((i + 1)); done; exit 3'
_BARE = """
import subprocess, sys
import cluster.hardware, launcher.jobs.agents.agent, launcher.verbs.agent
command = ["sh", "-c", sys.argv[1], "sh", "", sys.argv[2]]
ranks = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(int(sys.argv[3]))]
for rank in ranks:
    rank.communicate()
"""


def run_bare(hosts: int, ranks_per_host: int) -> float:
    """Seconds that the processes alone take."""
    start = time.perf_counter()
    command = [sys.executable, "-c", _BARE, _RANK, str(LINES_A_RANK), str(ranks_per_host)]
    agents = [subprocess.Popen(command, cwd=REPOSITORY) for _ in range(hosts)]
    if {agent.wait(600) for agent in agents} != {0}:
        raise RuntimeError("a process of the comparison failed")
    return time.perf_counter() - start


def run_job(hosts: int, ranks_per_host: int) -> dict[str, Any]:
    """Runs head and agents; what the head measured."""
    from launcher.jobs.agents.protocol import ATTEMPT, HOST_NAME

    with tempfile.TemporaryDirectory(prefix="mega-scale-") as folder:
        command = [sys.executable, __file__, "--head", folder, "--hosts", str(hosts), "--ranks", str(ranks_per_host)]
        start = time.perf_counter()
        head = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert head.stdout is not None
        environ = {**os.environ, **json.loads(head.stdout.readline()), ATTEMPT: "1"}
        agents = [
            subprocess.Popen(
                [sys.executable, "-m", "launcher", "agent"], cwd=REPOSITORY, env={**environ, HOST_NAME: f"host{number}"}
            )
            for number in range(hosts)
        ]
        output, _ = head.communicate(timeout=600)
        codes = {agent.wait(60) for agent in agents}
        measured: dict[str, Any] = json.loads(output)
    if codes != {0} or head.returncode != 0:
        raise RuntimeError(f"agents ended with {codes}, the head with {head.returncode}")
    return {**measured, "total_s": time.perf_counter() - start}


async def run_head(folder: Path, hosts: int, ranks_per_host: int) -> dict[str, Any]:
    """The head's part: the seconds of each stage, how lines were folded, and the most memory that this process ever had."""
    from launcher.jobs.agents.head import Head, RankEnded, RanksPlan

    names = tuple(f"host{number}" for number in range(hosts))
    gate = folder / "gate"
    os.mkfifo(gate)
    opened = os.open(gate, os.O_RDWR)  # to the end: who came after a writer had closed it would wait for ever
    shown: list[str] = []
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    async with Head(token=_TOKEN, silence_s=15.0, say=lambda text: print(text, file=sys.stderr)) as head:
        attempt = head.attempt(1, expected=dict.fromkeys(names, 1), log=folder / "job.log", echo=shown.append)
        print(json.dumps(head.environ), flush=True)
        if missing := await attempt.gather(60):
            raise RuntimeError(f"{len(missing)} hosts have not come")
        seconds = {"gather_s": lap()}
        plan = RanksPlan(
            hosts=names,
            ranks_per_host=ranks_per_host,
            command=("sh", "-c", _RANK, "sh", str(gate), str(LINES_A_RANK)),
            environ={},
            directory=folder,
        )
        await attempt.start_ranks(plan)
        seconds["start_ranks_s"] = lap()
        os.write(opened, b"\n" * hosts * ranks_per_host)
        while attempt.running():
            event = await attempt.next_event()
            if not isinstance(event, RankEnded) or event.code != 3:
                raise RuntimeError(f"a rank did not end as it should: {event}")
        seconds["lines_and_ends_s"] = lap()
        await attempt.release()
        seconds["release_s"] = lap()
    said = sum(ranks_in(line) for line in shown)
    return {
        **seconds,
        "lines_said": said,
        "lines_written": len(shown),
        "head_peak_bytes": peak_bytes(),
    }


def ranks_in(line: str) -> int:
    """How many ranks the front of a folded line names."""
    found = re.match(r"\[([^\]]*)\]", line)
    if found is None:
        raise RuntimeError(f"no ranks stand before {line!r}")
    if total := re.search(r"(\d+) ranks$", found[1]):
        return int(total[1])
    ends = [part.split("-") for part in found[1].split(",")]
    return sum(int(each[-1]) - int(each[0]) + 1 for each in ends)


def peak_bytes() -> int:
    """The most main memory that this process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=128, help="agents")
    parser.add_argument("--ranks", type=int, default=8, help="ranks of each")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--head", type=Path, help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.head is not None:
        print(json.dumps(asyncio.run(run_head(options.head, options.hosts, options.ranks))))
        return 0
    runs, bare_s = [], []
    for _ in range(options.repeats):
        bare_s.append(run_bare(options.hosts, options.ranks))
        runs.append(run_job(options.hosts, options.ranks))
    median = sorted(runs, key=lambda run: run["total_s"])[len(runs) // 2]
    bare = sorted(bare_s)[len(bare_s) // 2]
    num_lines = options.hosts * options.ranks * LINES_A_RANK
    slowest, largest = max(run["total_s"] for run in runs), max(run["head_peak_bytes"] for run in runs)
    whole = all(run["lines_said"] == num_lines for run in runs)
    result = {
        "hosts": options.hosts,
        "ranks": options.hosts * options.ranks,
        "median": median,
        "bare_s": bare,
        "ratio": median["total_s"] / bare,
        "bound_s": BOUND_S,
        "bound_bytes": BOUND_BYTES,
        "met": whole and slowest <= BOUND_S and largest <= BOUND_BYTES,
        "runs": runs,
        "bare_runs_s": bare_s,
        "summary": {
            f"{options.hosts * options.ranks} ranks, {options.hosts} agents": f"{median['total_s']:.1f} s in all, "
            f"{slowest:.1f} s at most (bound {BOUND_S:g} s)",
            "  agents start and come": f"{median['gather_s']:.1f} s",
            "  ranks are started": f"{median['start_ranks_s']:.1f} s",
            "  lines and ends": f"{median['lines_and_ends_s']:.1f} s",
            "  agents go home": f"{median['release_s']:.1f} s",
            "the processes alone": f"{bare:.1f} s",
            "lines": f"{num_lines} said, {median['lines_written']} written" + ("" if whole else ", SOME ARE MISSING"),
            "memory of the head": f"{largest / 1e6:.0f} MB at most (bound {BOUND_BYTES / 1e6:g} MB)",
        },
    }
    return report("launcher_scale", result, options)


if __name__ == "__main__":
    sys.exit(main())
