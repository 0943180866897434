"""A made-up host: the files and recorded answers that counters are read from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PORT = "sys/class/infiniband/mlx5_0/ports/1"
FILES: Mapping[str, str] = {
    f"{PORT}/counters/port_xmit_data": "1000\n",
    f"{PORT}/counters/port_rcv_data": "2000\n",
    f"{PORT}/counters/port_xmit_wait": "7\n",
    f"{PORT}/counters/symbol_error": "0\n",
    f"{PORT}/hw_counters/out_of_sequence": "3\n",
    f"{PORT}/hw_counters/lifespan": "12\n",
    f"{PORT}/state": "4: ACTIVE\n",
    f"{PORT}/phys_state": "5: LinkUp\n",
    f"{PORT}/rate": "400 Gb/sec (4X NDR)\n",
    f"{PORT}/link_layer": "Ethernet\n",
    f"{PORT}/gid_attrs/types/0": "IB/RoCE v1\n",
    f"{PORT}/gid_attrs/types/1": "RoCE v2\n",
    "proc/net/snmp": (
        "Ip: Forwarding DefaultTTL\nIp: 2 64\n"
        "Tcp: RtoAlgorithm RtoMin RtoMax MaxConn InSegs OutSegs RetransSegs InErrs InCsumErrors\n"
        "Tcp: 1 200 120000 -1 5000 6000 12 0 0\n"
        "Udp: InDatagrams RcvbufErrors\nUdp: 9 4\n"
    ),
    "proc/net/netstat": (
        "TcpExt: SyncookiesSent TCPTimeouts TCPLostRetransmit TCPDeliveredCE TCPOFOQueue\n"
        "TcpExt: 0 2 1 0 8\n"
        "IpExt: InOctets InCEPkts\nIpExt: 99 5\n"
    ),
    "proc/net/softnet_stat": "000000ff 00000001 00000000\n000000ff 0000000a 00000000\n",
    "proc/net/dev": (
        "Inter-|   Receive  |  Transmit\n"
        " face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier comp\n"
        "    lo: 100 1 0 0 0 0 0 0 100 1 0 0 0 0 0 0\n"
        "  eth0: 500 5 1 2 0 0 0 0 700 7 3 4 0 0 0 0\n"
    ),
    "sys/class/net/lo/statistics/rx_bytes": "100\n",
    "sys/class/net/eth0/statistics/rx_bytes": "500\n",
    "sys/class/net/eth0/statistics/tx_bytes": "700\n",
    "sys/class/net/eth0/statistics/rx_crc_errors": "6\n",
    "sys/class/net/eth0/carrier_down_count": "1\n",
    "sys/class/net/eth0/operstate": "up\n",
    "sys/class/net/eth0/speed": "100000\n",
    "sys/class/net/eth0/device/vendor": "0x15b3\n",
    "recorded/ethtool -S eth0": (
        "NIC statistics:\n     rx_packets: 5\n     rx_prio3_pause: 41\n     tx_prio3_pause: 0\n"
        "     rx_prio3_buf_discard: 2\n     rx_discards_phy: 1\n     rx_corrected_bits_phy: 77\n"
    ),
    "recorded/tc -j -s qdisc": (
        '[{"kind":"noqueue","dev":"lo","root":true,"drops":9,"overlimits":9,"requeues":9},'
        '{"kind":"mq","dev":"eth0","root":true,"drops":5,"overlimits":1,"requeues":0},'
        '{"kind":"fq_codel","dev":"eth0","parent":":1","drops":5,"overlimits":1,"requeues":0}]'
    ),
    "proc/self/cgroup": "4:cpu,cpuacct:/jobs/one\n1:name=systemd:/\n0::/pods/two\n",
    "sys/fs/cgroup/cpu/jobs/one/cpu.stat": "nr_periods 40\nnr_throttled 30\nthrottled_time 2500000000\n",
    "sys/fs/cgroup/cpu/jobs/cpu.stat": "nr_periods 40\nnr_throttled 0\nthrottled_time 0\n",
    "sys/fs/cgroup/pods/cpu.stat": "usage_usec 5\nnr_periods 4\nnr_throttled 3\nthrottled_usec 1500000\n",
    "proc/stat": "cpu  10 0 10 100 0 0 0 250 0 0\ncpu0 10 0 10 100 0 0 0 250 0 0\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "2\n",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "3\n",
    "sys/devices/system/cpu/cpufreq/thermal_throttle/core_throttle_count": "100\n",
    "proc/driver/nvidia/version": "NVRM version\n",
    "recorded/nvidia-smi --query-gpu=index,clocks_throttle_reasons.active --format=csv,noheader,nounits": (
        "0, 0x0000000000000001\n1, 0x0000000000000044\n2, [N/A]\n"
    ),
    "recorded/nvidia-smi nvlink -e": (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a)\n"
        "\t Link 0: Replay Errors: 1\n\t Link 0: CRC Errors: 0\n\n\t Link 1: Replay Errors: 4\n"
        "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-b)\n\t Link 0: Replay Errors: 0\n"
    ),
}


def plant(root: Path, files: Mapping[str, str]) -> Path:
    """Writes the files below `root`, over those that are there, and returns it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
