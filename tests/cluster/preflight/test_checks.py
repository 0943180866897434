"""Each check on made-up facts: what is found, who is bad, and what the user reads."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.fabric.findings import Finding, Kind
from cluster.preflight.checks import (
    ClockOffset,
    card_findings,
    clock_findings,
    device_findings,
    disk_findings,
    fabric_findings,
    network_findings,
    sharing_findings,
)
from cluster.preflight.verdict import PreflightFinding, PreflightVerdict, Severity

FOUR = {rank: f"n{rank}" for rank in range(4)}
GPU = {"name": "NVIDIA H100", "count": 8, "error": "", "seconds": 2e-5, "lacks": ""}
CARD = {"name": "NVIDIA H100", "driver": "570.1", "ecc": "Enabled", "uncorrected": "0"}
PORTS = {
    "kind": "infiniband",
    "has": {"400 Gbit/s InfiniBand": 8},
    "left_out": {},
    "interface_mbit": 100000,
}


def the_one(findings: list[PreflightFinding]) -> PreflightFinding:
    assert len(findings) == 1, findings
    return findings[0]


def devices(**changed: Any) -> dict[int, dict[str, Any]]:
    """Four ranks' devices, rank 2's with changes."""
    return {rank: {**GPU, **(changed if rank == 2 else {})} for rank in range(4)}


def test_a_device_that_computes_wrongly_is_bad() -> None:
    assert device_findings(devices(), FOUR) == []
    wrong = "1 of 512 rows of a float32 matrix product are wrong"
    finding = the_one(device_findings(devices(error=wrong), FOUR))
    assert (finding.kind, finding.bad_hosts, finding.ranks) == ("device", ("n2",), (2,))
    assert finding.sentence == (
        f"n2 computes wrongly on rank 2's device (NVIDIA H100): {wrong}. Take it out of service."
    )
    everywhere = {rank: {**GPU, "error": wrong} for rank in range(4)}
    assert [finding.bad_hosts for finding in device_findings(everywhere, FOUR)] == [()] * 4


def test_hosts_without_the_device_that_is_asked_for() -> None:
    none = 'run.device = "cuda": no CUDA device'
    missing = {"name": None, "count": 0, "seconds": None, "lacks": none}
    finding = the_one(device_findings(devices(**missing), FOUR))
    assert (finding.kind, finding.severity, finding.bad_hosts) == ("device", "error", ("n2",))
    assert finding.sentence.startswith(f'{none} on n2. Set it to "auto" or "cpu", or take hosts')
    everywhere = the_one(device_findings({rank: {**GPU, **missing} for rank in range(4)}, FOUR))
    assert (everywhere.bad_hosts, everywhere.ranks) == ((), (0, 1, 2, 3))
    few = 'run.device = "auto": fewer CUDA devices (1) than ranks'
    assert "on n2. Lower launch.ranks_per_node." in the_one(device_findings(devices(lacks=few), FOUR)).sentence


def test_a_gpu_that_is_slower_than_most_is_bad() -> None:
    assert device_findings(devices(seconds=2.4e-5), FOUR) == []
    finding = the_one(device_findings(devices(seconds=3e-5), FOUR))
    assert (finding.kind, finding.bad_hosts) == ("slow_device", ("n2",))
    assert "rank 2's NVIDIA H100 takes 30 us for a product that takes the others 20 us" in finding.sentence


def test_another_kind_or_number_of_gpus_is_told() -> None:
    finding = the_one(device_findings(devices(name="NVIDIA A100", count=7), FOUR))
    assert finding.bad_hosts == ("n2",)
    assert "GPUs (7 there, and 8 elsewhere) and kind of GPU (NVIDIA A100 there, and NVIDIA H100" in finding.sentence


def test_what_nvidia_smi_says_is_compared_and_broken_memory_is_told() -> None:
    cards = {rank: [CARD] * 8 for rank in range(4)}
    assert card_findings(cards, FOUR) == []
    assert card_findings({rank: [] for rank in range(4)}, FOUR) == []
    broken = the_one(card_findings({**cards, 1: [CARD, {**CARD, "uncorrected": "3"}, *[CARD] * 6]}, FOUR))
    assert broken.bad_hosts == ("n1",)
    assert "n1 has had errors of GPU memory that ECC could not correct: 3 on GPU 1. Reset the GPU" in broken.sentence
    other = the_one(card_findings({**cards, 3: [{**CARD, "driver": "550.2", "ecc": "Disabled"}] * 8}, FOUR))
    assert (other.severity, other.hosts, other.bad_hosts) == ("warning", ("n3",), ())
    assert "ECC (Disabled there, and Enabled elsewhere) and driver (550.2 there, and 570.1" in other.sentence
    fallen_off = the_one(card_findings({**cards, 0: [CARD] * 7}, FOUR))
    assert "GPUs that nvidia-smi lists (7 there, and 8 elsewhere)" in fallen_off.sentence
    assert (fallen_off.severity, fallen_off.bad_hosts) == ("error", ("n0",))


def test_a_host_with_a_full_disk_is_bad_and_a_full_shared_disk_is_nobodys() -> None:
    free: dict[int, int | None] = {0: 10**12, 1: 5 * 10**8, 2: 10**12, 3: None}
    finding = the_one(disk_findings(free, FOUR, directory="/runs/a", least_bytes=1e9))
    assert (finding.kind, finding.hosts, finding.bad_hosts) == ("disk", ("n1",), ("n1",))
    assert finding.sentence == (
        "Too little is free in /runs/a: 0.50 GB on n1; launch.preflight.min_free_disk_gb asks for 1 GB. Free some, or set "
        "run.directory to another disk."
    )
    assert disk_findings(free, FOUR, directory="/runs/a", least_bytes=1e8) == []
    full = the_one(disk_findings(dict.fromkeys(range(4), 1), FOUR, directory="/runs/a", least_bytes=1e9))
    assert full.bad_hosts == ()


def test_a_host_that_shares_no_files_is_bad_where_most_do() -> None:
    problems = {0: "", 1: "", 2: "does not see what rank 0 wrote", 3: ""}
    finding = the_one(sharing_findings(problems, FOUR, directory="/runs/a"))
    assert (finding.kind, finding.bad_hosts) == ("shared_files", ("n2",))
    assert finding.sentence == (
        "/runs/a is not the same for all hosts: n2 does not see what rank 0 wrote. Look at the mounts there."
    )
    assert sharing_findings(dict.fromkeys(range(4), ""), FOUR, directory="/runs/a") == []


def test_where_few_share_files_nobody_can_say_which_are_right() -> None:
    problems = {0: "", 1: "cannot write there (Read-only file system)", 2: "", 3: "does not see it"}
    finding = the_one(sharing_findings(problems, FOUR, directory="/tmp/a"))
    assert (finding.hosts, finding.bad_hosts) == (("n1", "n3"), ())
    assert finding.sentence.endswith("Set run.directory to a file system that all hosts share and may write.")


def offsets(*seconds: float, uncertainty_s: float = 0.001) -> dict[int, ClockOffset]:
    return {rank: ClockOffset(seconds=one, uncertainty_s=uncertainty_s) for rank, one in enumerate(seconds)}


def test_a_clock_that_is_away_from_most_is_bad_also_that_of_rank_0() -> None:
    assert clock_findings(offsets(0.0, 2.0, -2.0, 1.0), FOUR, most_s=5.0) == []
    finding = the_one(clock_findings(offsets(0.0, 0.1, -62.0, 0.2), FOUR, most_s=5.0))
    assert (finding.kind, finding.bad_hosts) == ("clock", ("n2",))
    assert finding.sentence == (
        "Clocks are apart: n2 by -62.1 s from the others; launch.preflight.max_clock_offset_seconds allows 5 s. Start the "
        "time service (chrony, ntpd) there."
    )
    assert the_one(clock_findings(offsets(0.0, 30.0, 30.1, 30.2), FOUR, most_s=5.0)).bad_hosts == ("n0",)


def test_clocks_that_agree_in_halves_and_what_a_slow_way_hides_is_no_hosts_fault() -> None:
    halves = the_one(clock_findings(offsets(0.0, 0.1, 30.0, 30.1), FOUR, most_s=5.0))
    assert (halves.hosts, halves.bad_hosts) == (("n0", "n1", "n2", "n3"), ())
    assert "nobody can say which is right" in halves.sentence
    assert clock_findings(offsets(0.0, 0.0, 5.5, 0.0, uncertainty_s=0.3), FOUR, most_s=5.0) == []


def test_a_host_with_a_port_down_is_bad_and_told_why() -> None:
    networks: dict[int, dict[str, Any]] = {rank: dict(PORTS) for rank in range(4)}
    assert network_findings(networks, FOUR) == []
    networks[3] |= {
        "has": {"400 Gbit/s InfiniBand": 7},
        "left_out": {"mlx5_5:1 at 0000:5e:00.0 (InfiniBand, 400 Gbit/s, DOWN)": "it is DOWN"},
    }
    finding = the_one(network_findings(networks, FOUR))
    assert (finding.kind, finding.bad_hosts) == ("network", ("n3",))
    assert finding.sentence == (
        "n3 differs from the others in the network: ports (7 x 400 Gbit/s InfiniBand there, and 8 x 400 Gbit/s InfiniBand "
        "elsewhere). Look at ibstat, at cables and at switch ports there. There mlx5_5:1 at 0000:5e:00.0 "
        "(InfiniBand, 400 Gbit/s, DOWN) is not used on n3: it is DOWN."
    )


def test_an_interface_that_came_up_slower_is_told() -> None:
    tcp = {**PORTS, "kind": "socket", "has": {}}
    networks = {rank: {**tcp, "interface_mbit": 1000 if rank == 1 else 100000} for rank in range(4)}
    finding = the_one(network_findings(networks, FOUR))
    assert "speed of its interface (1000 Mbit/s there, and 100000 Mbit/s" in finding.sentence
    assert finding.bad_hosts == ("n1",)


def test_an_interface_that_carries_no_gradients_may_be_of_any_speed() -> None:
    networks = {rank: {**PORTS, "interface_mbit": 1000 if rank == 1 else 100000} for rank in range(4)}
    assert network_findings(networks, FOUR) == []


def test_a_host_without_the_network_that_is_asked_for_is_bad_unless_all_lack_it() -> None:
    lacking = {"error": 'n1: launch.network = "infiniband" needs an active InfiniBand port'}
    networks: dict[int, dict[str, Any]] = {0: dict(PORTS), 1: lacking, 2: dict(PORTS), 3: dict(PORTS)}
    finding = the_one(network_findings(networks, FOUR))
    assert (finding.bad_hosts, finding.sentence) == (("n1",), lacking["error"])
    assert [one.bad_hosts for one in network_findings(dict.fromkeys(range(4), lacking), FOUR)] == [()] * 4


def found(kind: Kind, *hosts: str) -> Finding:
    ranks = tuple(int(host[1:].partition(":")[0]) for host in hosts)
    return Finding(
        kind=kind, hosts=hosts, ranks=ranks, confidence=0.99, evidence={"lost_share": 0.7}, sentence=f"{kind} ..."
    )


def test_hosts_to_exclude_of_a_diagnosis_are_bad() -> None:
    findings = fabric_findings([found("slow_link", "n2"), found("bad_path", "n0", "n3")], FOUR)
    assert [finding.bad_hosts for finding in findings] == [("n2",), ("n3",)]
    assert findings[0].evidence == {"lost_share": 0.7, "confidence": 0.99}
    assert findings[0].severity == "error"


def test_a_congested_uplink_is_told_and_stops_nobody() -> None:
    findings = fabric_findings([found("congested_uplink", "n0", "n1")], FOUR)
    verdict = PreflightVerdict(findings=tuple(findings), seconds=1.0)
    assert (findings[0].severity, verdict.ok, verdict.bad_hosts) == ("warning", True, ())


def test_a_fault_that_names_all_hosts_leaves_none_out() -> None:
    finding = the_one(fabric_findings([found("transport_fault", "n0", "n1", "n2", "n3")], FOUR))
    assert (finding.bad_hosts, finding.severity) == ((), "error")


def test_no_more_than_half_of_the_hosts_are_left_out_for_being_slow_the_surest_first() -> None:
    slow = [found("slow_link", "n2"), found("slow_receiver", "n1"), found("slow_receiver", "n3")]
    assert [finding.bad_hosts for finding in fabric_findings(slow, FOUR)] == [("n2",), ("n1",), ()]
    assert [finding.bad_hosts for finding in fabric_findings([found("slow_host", "n1")], {0: "n0", 1: "n1"})] == [
        ("n1",)
    ]
    gone = [found("missing_rank", "n0", "n1", "n2")]
    assert fabric_findings(gone, FOUR)[0].bad_hosts == ("n0", "n1", "n2")


def test_ranks_that_stand_for_hosts_on_one_host_are_told_as_that_host() -> None:
    finding = the_one(fabric_findings([found("slow_link", "n1:1")], {0: "gpu", 1: "gpu"}))
    assert (finding.hosts, finding.bad_hosts) == (("gpu",), ())


@pytest.mark.parametrize("bad_hosts", [(), ("n1",)])
def test_a_verdict_reads_back_as_itself(bad_hosts: tuple[str, ...]) -> None:
    finding = PreflightFinding(
        kind="clock", hosts=("n1",), ranks=(1,), sentence="late", bad_hosts=bad_hosts, evidence={"s": 1.0}
    )
    verdict = PreflightVerdict(findings=(finding, finding), seconds=1.5, details={"hosts": {"n1": [1]}})
    assert PreflightVerdict.from_data(verdict.as_data()) == verdict
    assert (verdict.ok, verdict.bad_hosts, verdict.as_data()["ok"]) == (False, bad_hosts, False)


def test_a_verdict_tells_errors_first_and_of_each_bad_host_the_first_reason() -> None:
    def finding(sentence: str, *bad: str, severity: Severity = "error") -> PreflightFinding:
        return PreflightFinding(kind="disk", hosts=bad, ranks=(), sentence=sentence, bad_hosts=bad, severity=severity)

    verdict = PreflightVerdict(
        findings=(finding("busy", severity="warning"), finding("full", "n1", "n2"), finding("late", "n2", "n3")),
        seconds=1.0,
    )
    data = verdict.as_data()
    assert data["sentences"] == ["full", "late", "busy"]
    assert data["bad_hosts"] == ["n1", "n2", "n3"]
    assert data["reasons"] == {"n1": "full", "n2": "full", "n3": "late"}
