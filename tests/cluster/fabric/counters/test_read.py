from pathlib import Path

import pytest

from cluster.fabric.counters import growth, read_counters
from cluster.fabric.counters.sources import Sources
from tests.cluster.fabric.counters.trees import FILES, PORT, plant


def test_the_counters_of_every_area_of_a_host_are_read(tmp_path: Path) -> None:
    snapshot = read_counters(plant(tmp_path, FILES))
    counts = {name: count.value * count.unit for name, count in snapshot.counts.items()}
    expected = {
        "infiniband/mlx5_0:1/port_xmit_data_bytes": 4000,
        "infiniband/mlx5_0:1/port_rcv_data_bytes": 8000,
        "infiniband/mlx5_0:1/port_xmit_wait": 7,
        "infiniband/mlx5_0:1/symbol_error": 0,
        "infiniband/mlx5_0:1/out_of_sequence": 3,
        "tcp/host/InSegs": 5000,
        "tcp/host/OutSegs": 6000,
        "tcp/host/RetransSegs": 12,
        "tcp/host/InCsumErrors": 0,
        "tcp/host/TCPTimeouts": 2,
        "tcp/host/TCPLostRetransmit": 1,
        "tcp/host/TCPDeliveredCE": 0,
        "tcp/host/TCPOFOQueue": 8,
        "ip/host/InCEPkts": 5,
        "udp/host/RcvbufErrors": 4,
        "softnet/host/dropped": 11,
        "net/eth0/rx_bytes": 500,
        "net/eth0/tx_bytes": 700,
        "net/eth0/rx_crc_errors": 6,
        "net/eth0/carrier_down_count": 1,
        "ethtool/eth0/rx_prio3_pause": 41,
        "ethtool/eth0/tx_prio3_pause": 0,
        "ethtool/eth0/rx_prio3_buf_discard": 2,
        "ethtool/eth0/rx_discards_phy": 1,
        "ethtool/eth0/rx_corrected_bits_phy": 77,
        "qdisc/eth0/drops": 5,
        "qdisc/eth0/overlimits": 1,
        "qdisc/eth0/requeues": 0,
        "cgroup/jobs.one/nr_throttled": 30,
        "cgroup/jobs.one/throttled_s": 2.5,
        "cgroup/jobs/nr_throttled": 0,
        "cgroup/jobs/throttled_s": 0,
        "cgroup/pods/nr_throttled": 3,
        "cgroup/pods/throttled_s": 1.5,
        "cpu/host/steal_s": 2.5,
        "cpu/host/thermal_throttle_events": 5,
        "nvlink/0/replay_errors": 5,
        "nvlink/0/crc_errors": 0,
        "nvlink/1/replay_errors": 0,
    }
    assert {name: counts.get(name) for name in expected} == pytest.approx(expected)
    others = counts.keys() - expected.keys()
    assert all(name.startswith("net/eth0/") for name in others), others  # statistics of eth0 that the tree leaves at 0


def test_the_states_of_ports_and_gpus_are_read(tmp_path: Path) -> None:
    assert read_counters(plant(tmp_path, FILES)).states == {
        "infiniband/mlx5_0:1/is_down": 0.0,
        "infiniband/mlx5_0:1/rate_bytes_per_s": 50e9,
        "infiniband/mlx5_0:1/lacks_roce_v2": 0.0,
        "net/eth0/is_down": 0.0,
        "net/eth0/rate_bytes_per_s": 12.5e9,
        **{f"gpu/0/{reason}": 0.0 for reason in ("hw_slowdown", "sw_thermal_slowdown", "power_brake")},
        "gpu/0/power_cap": 0.0,
        "gpu/0/hw_thermal_slowdown": 0.0,
        "gpu/1/power_cap": 1.0,
        "gpu/1/hw_slowdown": 0.0,
        "gpu/1/sw_thermal_slowdown": 0.0,
        "gpu/1/hw_thermal_slowdown": 1.0,
        "gpu/1/power_brake": 0.0,
    }


@pytest.mark.parametrize(
    ("file", "text", "state"),
    [
        ("state", "1: DOWN\n", "is_down"),
        ("phys_state", "2: Polling\n", "is_down"),
        ("gid_attrs/types/1", "IB/RoCE v1\n", "lacks_roce_v2"),
    ],
)
def test_a_port_tells_what_is_wrong_with_it(tmp_path: Path, file: str, text: str, state: str) -> None:
    snapshot = read_counters(plant(tmp_path, {**FILES, f"{PORT}/{file}": text}))
    assert snapshot.states[f"infiniband/mlx5_0:1/{state}"] == 1.0


def test_a_namespace_counts_its_own_devices_not_those_below_sys(tmp_path: Path) -> None:
    # A process that entered a network namespace alone: /proc/net is the namespace's, /sys still the machine's.
    files = {**FILES, "proc/net/dev": FILES["proc/net/dev"].replace("eth0: 500", "veth7: 900")}
    snapshot = read_counters(plant(tmp_path, files))
    named = {name: count.value for name, count in snapshot.counts.items() if name.split("/")[0] in ("net", "ethtool")}
    assert named == {
        "net/veth7/rx_bytes": 900,
        "net/veth7/rx_packets": 5,
        "net/veth7/rx_errors": 1,
        "net/veth7/rx_dropped": 2,
        "net/veth7/tx_bytes": 700,
        "net/veth7/tx_packets": 7,
        "net/veth7/tx_errors": 3,
        "net/veth7/tx_dropped": 4,
    }


def test_a_host_without_counters_has_none(tmp_path: Path) -> None:
    snapshot = read_counters(tmp_path)
    assert not snapshot.counts
    assert not snapshot.states


def test_files_that_hold_something_else_are_left_out(tmp_path: Path) -> None:
    odd = {f"{PORT}/counters/port_xmit_wait": "N/A\n", "recorded/tc -j -s qdisc": "[{", f"{PORT}/rate": "unknown\n"}
    snapshot = read_counters(plant(tmp_path, {**FILES, **odd}))
    assert "infiniband/mlx5_0:1/port_xmit_wait" not in snapshot.counts
    assert "infiniband/mlx5_0:1/rate_bytes_per_s" not in snapshot.states
    assert not any(name.startswith("qdisc/") for name in snapshot.counts)
    assert "infiniband/mlx5_0:1/symbol_error" in snapshot.counts


def test_this_machine_counts_what_it_sends_to_itself() -> None:
    import socket

    before = read_counters()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver:
            sender.sendall(b"x")
            assert receiver.recv(1) == b"x"
    grown = growth(before, read_counters())
    assert grown["tcp/host/OutSegs"] >= 3
    assert min(grown.values()) >= 0


def test_a_command_that_is_missing_or_fails_answers_nothing() -> None:
    sources = Sources(Path("/"))
    assert sources.answer("echo", "hello") == "hello\n"
    assert sources.answer("no-such-command-anywhere") == ""
    assert sources.answer("false") == ""
