"""Plain data such as the verbs write it, with every part that a report can show."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.fabric.report import ReportData

HOSTS = tuple(f"h{number}" for number in range(8))
MBIT = 1e6 / 8


def finding(kind: str, hosts: tuple[str, ...], sentence: str, **evidence: Any) -> dict[str, Any]:
    """One finding as it stands in a verdict's JSON."""
    ranks = [HOSTS.index(host) for host in hosts if host in HOSTS]
    return {
        "kind": kind,
        "hosts": list(hosts),
        "ranks": ranks,
        "confidence": 0.99,
        "evidence": evidence,
        "sentence": sentence,
    }


def verdict(*findings: dict[str, Any], slow_row: int | None = 3, slow_cell: tuple[int, int] = (1, 6)) -> dict[str, Any]:
    """Of eight hosts below two leaves."""
    random = np.random.default_rng(5)
    rates = 48 * MBIT * np.exp(0.02 * random.standard_normal((8, 8)))
    if slow_row is not None:
        rates[slow_row] *= 0.44
    rates[slow_cell] *= 0.6
    compute = 0.05 * np.exp(0.006 * random.standard_normal(8))
    compute[5] *= 1.31
    return {
        "healthy": not findings,
        "findings": list(findings),
        "alpha_s": 210e-6,
        "beta_s_per_byte": 1 / (48 * MBIT),
        "seconds": 7.4,
        "rounds": 31,
        "details": {
            "hosts": list(HOSTS),
            "pairs_bytes_per_s": [
                [None if row == column else float(rates[row, column]) for column in range(8)] for row in range(8)
            ],
            "compute_s": dict(zip(HOSTS, map(float, compute))),
            "noise_share": 0.021,
            "groups": [list(HOSTS[:4]), list(HOSTS[4:])],
        },
    }


SLOW_SENDER = finding(
    "slow_sender",
    ("h3",),
    "h3 sends slowly: 21.1 Mbit/s out of it against 48.0 (median of 7 peers), into it 47.6: its outgoing link or NIC "
    "(confidence 0.99).",
    out_bytes_per_s=21.1 * MBIT,
    peers_out_bytes_per_s=48.0 * MBIT,
    keeps_share=0.44,
    counters={
        "supports": ["RetransSegs +1,510 of 102,400 OutSegs; 12 on others: it sent them again"],
        "contradicts": ["port_xmit_wait of mlx5_0:1 +12,345; 3 on others: the port had data and no room ahead"],
    },
)
BAD_PATH = finding(
    "bad_path",
    ("h1", "h6"),
    "h1 to h6 is slow: 28.8 Mbit/s against 48.0 on either host's other paths (confidence 0.98).",
    path_bytes_per_s=28.8 * MBIT,
)
STRAGGLER = finding(
    "slow_host",
    ("h5",),
    "rank 5 on h5 holds the others up since step 120: it works for 52 ms of a step where its peers take 40 ms (+30 %), "
    "which costs 12 ms a step, 21 % of it (confidence 0.99).",
    source="monitor",
    since_step=120,
    cost_s_per_step=0.012,
)
SLOW_HOST = finding(
    "slow_host",
    ("h5",),
    "h5 computes slowly: 65 ms for what takes the others 50 ms, +31 % (confidence 0.99).",
    compute_s=0.0655,
)
UPLINK = finding(
    "congested_uplink",
    HOSTS,
    "The uplink between h0-h3 and h4-h7 is congested by foreign traffic: 11 Mbit/s across it against 48 within "
    "(confidence 0.97).",
    competitors="foreign",
)


def sweep() -> dict[str, Any]:
    """Rows and fits of two sets of groups, as `SweepResult.as_data` writes them."""
    rows, fits = [], []
    for group, size, top in (("world", 8, 1.0), ("tp", 4, 2.4)):
        for kind, factor in (("all_reduce", 1.75), ("all_gather", 0.875), ("all_to_all", 0.875), ("send_recv", 1.0)):
            for mode, share in (("isolated", 1.0), ("together", 0.7)):
                alpha, beta = 2.1e-4, 1 / (top * share * 6e6)
                for exponent in range(10, 25, 2):
                    seconds = 14 * alpha + factor * 2**exponent * beta
                    rows.append(
                        {
                            "kind": kind,
                            "num_bytes": 2**exponent,
                            "group": group,
                            "mode": mode,
                            "group_size": size,
                            "num_groups": 8 // size,
                            "times": {
                                "min_s": 0.97 * seconds,
                                "median_s": seconds,
                                "p99_s": 1.1 * seconds,
                                "noise_share": 0.01,
                            },
                            "algbw_bytes_per_s": 2**exponent / seconds,
                            "busbw_bytes_per_s": factor * 2**exponent / seconds,
                            "correct": True,
                            "slowest_ranks": [],
                            "slowest_s": None,
                        }
                    )
                fits.append(
                    {
                        "group": group,
                        "mode": mode,
                        "model": {
                            "kind": kind,
                            "group_size": size,
                            "algorithm": "ring",
                            "alpha_s": {"value": alpha, "low": 0.9 * alpha, "high": 1.1 * alpha},
                            "beta_s_per_byte": {"value": beta, "low": 0.98 * beta, "high": 1.02 * beta},
                            "correlation": -0.4,
                            "residual_share": 0.02,
                            "num_sizes": 8,
                        },
                    }
                )
    return {
        "rows": rows,
        "fits": fits,
        "groups": [
            {"name": "world", "groups": [list(range(8))], "only_together": False},
            {"name": "tp", "groups": [[0, 1, 2, 3], [4, 5, 6, 7]], "only_together": False},
        ],
        "transport": "gloo",
        "world_size": 8,
        "hosts": list(HOSTS),
        "taken_at": "2026-11-23T07:00:00+00:00",
        "seconds": 41.0,
        "circumstances": {"torch": "2.13.0"},
    }


def waits() -> list[dict[str, Any]]:
    """Rank 5 is late from step 120 on."""
    random = np.random.default_rng(7)
    records = []
    for step in range(0, 300, 10):
        late = {str(rank): float(abs(random.normal(0.0006, 0.0003))) for rank in range(8)}
        if step >= 120:
            late["5"] += 0.012
        network = {"dp_shard": 0.0036 + float(random.normal(0, 1e-4)), "tp": 0.0016}
        waits = {"dp_shard": network["dp_shard"] + max(late.values()), "tp": 0.0021}
        records.append(
            {"step": step + 9, "first_step": step, "wait_s": waits, "network_s": network, "late_s": late, "busy_s": {}}
        )
    return records


PREDICTIONS: list[dict[str, Any]] = [
    {
        "axis": "tp",
        "kind": "all_gather",
        "expected": {"value": 0.0031, "low": 0.0029, "high": 0.0033},
        "measured_s": 0.0052,
        "share": 0.677,
        "notable": True,
        "sentence": "all_gather on tp: 3.1 ms expected, 5.2 ms measured (+68 %)",
    },
    {
        "axis": "dp_shard",
        "kind": "reduce_scatter",
        "expected": {"value": 0.0110, "low": 0.0102, "high": 0.0118},
        "measured_s": 0.0113,
        "share": 0.027,
        "notable": False,
        "sentence": "reduce_scatter on dp_shard: 11.0 ms expected, 11.3 ms measured (+3 %)",
    },
    {
        "axis": "pp",
        "kind": "send",
        "expected": None,
        "measured_s": 0.0008,
        "share": None,
        "notable": False,
        "sentence": "send on pp: nothing expected, 0.8 ms measured",
    },
]
BASELINE: dict[str, Any] = {
    "baseline": "2026-11-16",
    "taken_at": "2026-11-16T07:00:00+00:00",
    "ok": False,
    "num_compared": 16,
    "noise_share": 0.012,
    "regressions": [
        {
            "metric": "busbw",
            "kind": "all_reduce",
            "group": "rail3",
            "mode": "isolated",
            "before": 41.2e9,
            "now": 33.8e9,
            "change_share": -0.18,
            "confidence": 0.98,
            "sentence": "busbw of all_reduce on rail 3 is 18 % below that of 2026-11-16 (41.2 -> 33.8 GB/s)",
        }
    ],
    "only_here": [],
    "only_there": ["all_to_all on rail 3, isolated"],
}


def everything() -> ReportData:
    """All parts at once."""
    return ReportData(
        title="Fabric report",
        subtitle="cluster east, 8 hosts, 2026-11-23 07:00 UTC",
        verdict=verdict(SLOW_SENDER, BAD_PATH, SLOW_HOST, STRAGGLER),
        sweep=sweep(),
        waits=waits(),
        predictions=PREDICTIONS,
        baseline=BASELINE,
        counters={
            "h3": {"tcp/host/RetransSegs": 1510.0, "tcp/host/OutSegs": 102400.0, "net/eth0/tx_bytes": 7.3e8},
            "h2": {"tcp/host/RetransSegs": 9.0, "tcp/host/OutSegs": 112300.0, "net/eth0/tx_bytes": 7.8e8},
            "h4": {"tcp/host/RetransSegs": 12.0, "tcp/host/OutSegs": 110900.0, "net/eth0/tx_bytes": 7.9e8},
        },
    )
