from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from cluster.fabric.counters import cite, growth, mean, read_counters
from cluster.fabric.counters.meaning import READINGS, SIGNALS
from cluster.fabric.findings import KINDS, Kind
from tests.cluster.fabric.counters.trees import FILES, PORT, plant

WAIT = "infiniband/mlx5_0:1/port_xmit_wait"


@pytest.mark.parametrize(
    ("counter", "kind", "supports"),
    [
        # Each row of the facts: congestion, faults of links, loss, a host that cannot absorb, and its throttled processor.
        (WAIT, "congested_uplink", True),
        (WAIT, "slow_sender", False),
        ("ethtool/eth0/rx_prio3_pause", "congested_uplink", True),
        ("ethtool/eth0/rx_prio3_pause", "slow_link", False),
        ("ethtool/eth0/tx_prio3_pause", "slow_receiver", True),
        ("ethtool/eth0/tx_prio3_pause", "congested_uplink", False),
        ("infiniband/mlx5_0:1/np_ecn_marked_roce_packets", "slow_receiver", True),
        ("infiniband/mlx5_0:1/rp_cnp_handled", "congested_uplink", True),
        ("infiniband/mlx5_0:1/symbol_error", "slow_link", True),
        ("infiniband/mlx5_0:1/symbol_error", "bad_path", False),
        ("infiniband/mlx5_0:1/port_rcv_remote_physical_errors", "bad_path", True),
        ("infiniband/mlx5_0:1/packet_seq_err", "slow_sender", True),
        ("infiniband/mlx5_0:1/out_of_sequence", "slow_receiver", True),
        ("infiniband/mlx5_0:1/out_of_buffer", "slow_receiver", True),
        ("infiniband/mlx5_0:1/local_ack_timeout_err", "transport_fault", True),
        ("infiniband/mlx5_0:1/req_transport_retries_exceeded", "mismatched_collective", False),
        ("infiniband/mlx5_0:1/rnr_nak_retry_err", "transport_fault", True),
        ("infiniband/mlx5_0:1/rx_icrc_encapsulated", "slow_link", True),
        ("cgroup/jobs/throttled_s", "slow_host", True),
        ("cgroup/jobs/throttled_s", "slow_sender", False),
        ("gpu/3/hw_thermal_slowdown", "slow_host", True),
        ("nvlink/0/replay_errors", "slow_link", True),
        ("softnet/host/dropped", "slow_receiver", True),
        ("net/eth0/carrier_down_count", "transport_fault", True),
    ],
)
def test_a_counter_speaks_for_or_against_a_finding(counter: str, kind: Kind, supports: bool) -> None:
    citation = cite(kind, {counter: 5.0})
    spoken, silent = (
        (citation.supports, citation.contradicts) if supports else (citation.contradicts, citation.supports)
    )
    assert len(spoken) == 1
    assert not silent
    assert counter.rpartition("/")[2] in spoken[0]
    quiet = cite(kind, {counter: 0.0})
    assert not quiet.supports


def test_a_sentence_has_the_number_the_device_and_what_it_means() -> None:
    growths = {WAIT: 12345.0, "infiniband/mlx5_1:1/port_xmit_wait": 10.0}
    assert cite("congested_uplink", growths).supports == (
        "port_xmit_wait of mlx5_0:1, mlx5_1:1 +12,355: the port had data and no room ahead",
    )


def test_states_have_no_number() -> None:
    assert cite("slow_host", {"gpu/1/hw_thermal_slowdown": 1.0}).supports == (
        "hw_thermal_slowdown of gpu 1: heat holds its GPU's clock back",
    )


def test_beside_others_only_what_grew_clearly_more_is_cited() -> None:
    others = [{WAIT: 100.0}, {WAIT: 120.0}, {WAIT: 5000.0}]
    assert not cite("congested_uplink", {WAIT: 150.0}, others=others).supports
    assert cite("congested_uplink", {WAIT: 300.0}, others=others).supports == (
        "port_xmit_wait of mlx5_0:1 +300; 120 on others: the port had data and no room ahead",
    )
    # Of much, half as much again is beyond chance, and nothing that sets a host apart.
    assert not cite("congested_uplink", {WAIT: 15_000.0}, others=[{WAIT: 10_000.0}]).supports
    # Twice nearly nothing is chance.
    assert not cite("congested_uplink", {WAIT: 4.0}, others=[{WAIT: 2.0}]).supports


def test_everyday_retransmissions_are_not_cited() -> None:
    growths = {"tcp/host/OutSegs": 100_000.0, "tcp/host/RetransSegs": 50.0}
    assert not cite("slow_sender", growths).supports
    assert cite("slow_sender", {**growths, "tcp/host/RetransSegs": 1500.0}).supports == (
        "RetransSegs +1,500 of 100,000 OutSegs: it sent them again",
    )


@pytest.mark.parametrize(
    ("counter", "kind"),
    [
        ("ethtool/eth0/rx_corrected_bits_phy", "slow_link"),
        ("gpu/0/power_cap", "slow_host"),
        ("net/eth1/is_down", "missing_rank"),
        ("qdisc/eth0/drops", "slow_sender"),
    ],
)
def test_what_healthy_hosts_have_too_is_cited_only_beside_others(counter: str, kind: Kind) -> None:
    assert not cite(kind, {counter: 1000.0}).supports
    assert not cite(kind, {counter: 1000.0}, others=[{counter: 1000.0}]).supports
    assert len(cite(kind, {counter: 1000.0}, others=[{counter: 0.0}]).supports) == 1


def test_counters_that_stand_still_speak_against_what_they_would_show() -> None:
    still = {WAIT: 0.0, "ethtool/eth0/rx_prio3_pause": 0.0, "tcp/host/TCPDeliveredCE": 0.0}
    assert cite("congested_uplink", still).contradicts == ("port_xmit_wait, rx_prio3_pause did not grow",)
    assert not cite("congested_uplink", {**still, "ip/host/InCEPkts": 3.0}).contradicts
    # Without a lossless fabric nothing would count it.
    assert not cite("congested_uplink", {"tcp/host/TCPDeliveredCE": 0.0}).contradicts
    assert cite("slow_host", {"cgroup/jobs/throttled_s": 0.0}).contradicts == ("throttled_s did not grow",)


def test_a_port_that_runs_slower_than_others_supports_a_slow_link() -> None:
    name = "infiniband/mlx5_0:1/rate_bytes_per_s"
    others = [{name: 50e9}, {name: 50e9}, {name: 25e9}]
    assert cite("slow_link", {name: 12.5e9}, others=others).supports == (
        "mlx5_0:1 runs at 25 % of the rate that it has on others",
    )
    assert not cite("slow_link", {name: 50e9}, others=others).supports
    assert not cite("slow_host", {name: 12.5e9}, others=others).supports


def test_hosts_named_together_count_as_their_mean() -> None:
    assert mean([{"a": 1.0, "b": 4.0}, {"a": 3.0}]) == {"a": 2.0, "b": 2.0}


def test_every_kind_has_a_reading_and_every_signal_is_of_use() -> None:
    assert READINGS.keys() == set(KINDS)
    used = set().union(*(reading.supports | reading.contradicts for reading in READINGS.values()))
    assert {signal.meaning for signal in SIGNALS} <= used


def test_every_signal_that_a_host_can_show_is_read_under_its_name(tmp_path: Path) -> None:
    """From files to sentences: a made-up host whose every known counter grew is cited for each of them."""
    names = [signal.pattern.rpartition("/")[2] for signal in SIGNALS if signal.pattern.startswith("infiniband/")]
    files = {f"{PORT}/hw_counters/{name}": "0\n" for name in names if name not in ("is_down", "lacks_roce_v2")}
    before = read_counters(plant(tmp_path, {**FILES, **files}))
    grown = growth(before, read_counters(plant(tmp_path, dict.fromkeys(files, "9\n"))))
    for name in files:
        counter = name.rpartition("/")[2]
        assert any(fnmatchcase(f"infiniband/mlx5_0:1/{counter}", signal.pattern) for signal in SIGNALS)
        assert grown[f"infiniband/mlx5_0:1/{counter}"] == 9.0
