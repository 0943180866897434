"""What NCCL shall use on made-up hosts: InfiniBand, RoCE on a bond, both, ports that are down, none at all."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil
import pytest

from cluster.errors import NetworkError
from cluster.network_settings import NetworkChoice, Wanted, choose_network, interface_towards, read_ports

IPV4 = "0000:0000:0000:0000:0000:ffff:0a00:0007"
LINK_LOCAL = "fe80:0000:0000:0000:0a00:0aff:fe00:0007"
IPV6 = "fd02:0000:0000:0000:0a00:0aff:fe00:0007"
EMPTY = "0000:0000:0000:0000:0000:0000:0000:0000"


class Host:
    """Files of a host below a folder. One with a port has what it takes to open it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def port(
        self,
        name: str,
        *,
        layer: str = "InfiniBand",
        state: str = "4: ACTIVE",
        physical: str = "5: LinkUp",
        gbit: int = 400,
        gids: tuple[tuple[str, str], ...] = (),
        pci: str | None = None,
    ) -> None:
        device, _, number = name.partition(":")
        self.write("dev/infiniband/uverbs0", "")
        folder = f"sys/class/infiniband/{device}/ports/{number}"
        files = {"link_layer": layer, "state": state, "phys_state": physical, "rate": f"{gbit} Gb/sec (4X NDR)"}
        for file, text in files.items():
            self.write(f"{folder}/{file}", text)
        for index, (kind, address) in enumerate(gids):
            self.write(f"{folder}/gid_attrs/types/{index}", kind)
            self.write(f"{folder}/gids/{index}", address)
        if pci is not None:
            (self.root / "sys/devices" / pci).mkdir(parents=True, exist_ok=True)
            (self.root / f"sys/class/infiniband/{device}/device").symlink_to(self.root / "sys/devices" / pci)

    def roce(self, name: str, *addresses: str, gbit: int = 200, state: str = "4: ACTIVE") -> None:
        gids = [(kind, address) for address in (LINK_LOCAL, *addresses) for kind in ("IB/RoCE v1", "RoCE v2")]
        self.port(name, layer="Ethernet", gbit=gbit, state=state, gids=(*gids, ("RoCE v2", EMPTY)))

    def choose(self, wanted: Wanted = "auto", interface: str | None = None, **environ: str) -> NetworkChoice:
        return choose_network(wanted, environ, host="n3", interface=interface, root=self.root)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_infiniband_uses_exactly_its_fast_active_ports_and_nothing_else(host: Host) -> None:
    for number in (0, 1):
        host.port(f"mlx5_{number}:1", pci=f"0000:5{number}:00.0")
    host.port("mlx5_2:1", gbit=100)
    host.port("mlx5_3:1", state="1: DOWN", physical="3: Disabled", pci="0000:d3:00.0")
    host.roce("mlx5_4:1", IPV4)
    for wanted in ("auto", "infiniband"):
        chosen = host.choose(wanted)
        assert chosen.kind == "infiniband"
        assert chosen.environment["NCCL_IB_HCA"] == "=mlx5_0:1,mlx5_1:1"
        assert chosen.environment["NCCL_NET"] == "IB"
        assert chosen.environment["NCCL_IB_TIMEOUT"] == "20"
        assert chosen.environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
        assert not {"NCCL_IB_ADDR_FAMILY", "NCCL_IB_GID_INDEX", "NCCL_SOCKET_IFNAME"} & chosen.environment.keys()
    assert [port.pci for port in chosen.ports] == ["0000:50:00.0", "0000:51:00.0"]
    assert chosen.left_out == {
        "mlx5_2:1 (InfiniBand, 100 Gbit/s, ACTIVE)": "slower than the fastest (400 Gbit/s): for storage or management",
        "mlx5_3:1 at 0000:d3:00.0 (InfiniBand, 400 Gbit/s, DOWN)": "it is DOWN",
        "mlx5_4:1 (Ethernet, 200 Gbit/s, ACTIVE)": "training uses InfiniBand",
    }
    assert all(setting.reason for setting in chosen.settings)
    reasons = {setting.name: setting.reason for setting in chosen.settings}
    assert reasons["NCCL_NET"] == "without InfiniBand NCCL fails, and never falls back to TCP"
    assert chosen.as_data()["has"] == {"400 Gbit/s InfiniBand": 2}


def test_roce_on_a_bond_needs_no_index_since_nccl_finds_the_address(host: Host) -> None:
    host.roce("mlx5_bond_0:1", IPV4)
    host.roce("mlx5_1:1")  # nobody has given it an address
    chosen = host.choose()
    assert chosen.kind == "roce"
    assert chosen.environment["NCCL_IB_HCA"] == "=mlx5_bond_0:1"
    assert chosen.environment["NCCL_NET"] == "IB"
    assert not {"NCCL_IB_ADDR_FAMILY", "NCCL_IB_GID_INDEX"} & chosen.environment.keys()
    assert list(chosen.left_out.values()) == ["it has no RoCE v2 address that can be routed"]


def test_roce_with_addresses_of_ipv6_alone_says_so_to_nccl(host: Host) -> None:
    host.roce("mlx5_0:1", IPV6)
    host.roce("mlx5_1:1", IPV6, IPV4)
    assert host.choose("roce").environment["NCCL_IB_ADDR_FAMILY"] == "AF_INET6"
    assert "NCCL_IB_ADDR_FAMILY" not in host.choose("roce", NCCL_IB_GID_INDEX="5").environment


def test_roce_is_taken_where_asked_for_though_there_is_infiniband(host: Host) -> None:
    host.port("mlx5_0:1")
    host.roce("mlx5_1:1", IPV4)
    assert host.choose("roce").environment["NCCL_IB_HCA"] == "=mlx5_1:1"


def test_a_port_that_is_active_without_a_link_is_not(host: Host) -> None:
    host.port("mlx5_0:1", physical="2: Polling")
    assert host.choose().kind == "socket"
    assert read_ports(host.root)[0].state == "Polling"


def test_what_is_wanted_and_not_there_is_an_error_that_says_what_is(host: Host) -> None:
    with pytest.raises(NetworkError) as nothing:
        host.choose("infiniband")
    assert str(nothing.value) == (
        'n3: launch.network = "infiniband" needs an active InfiniBand port, and has none: there is no device in '
        '/sys/class/infiniband. Look at its cables and driver (ibstat), or set launch.network = "auto"'
    )
    host.port("mlx5_0:1", state="2: INIT", pci="0000:5e:00.0")
    host.roce("mlx5_1:1")
    with pytest.raises(NetworkError, match=r"mlx5_0:1 at 0000:5e:00\.0 \(InfiniBand, 400 Gbit/s, INIT\); mlx5_1:1"):
        host.choose("infiniband")
    with pytest.raises(NetworkError, match="needs an active Ethernet port with a RoCE v2 address, and has none"):
        host.choose("roce")


def test_a_host_without_ports_uses_tcp_and_leaves_the_way_to_plug_ins_open(host: Host) -> None:
    host.port("efa_0:1", layer="Unspecified")
    assert host.choose().environment == {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}
    assert host.choose("socket").environment["NCCL_NET"] == "Socket"
    assert host.choose().as_data()["has"] == {}


def test_what_a_user_or_an_administrator_has_set_stays_and_is_told(host: Host) -> None:
    host.port("mlx5_0:1")
    host.write("etc/nccl.conf", "# NCCL_NET=Socket\nNCCL_IB_TIMEOUT = 22")
    host.write("home/me/.nccl.conf", "NCCL_IB_RETRY_CNT=5")
    set_already = {"NCCL_IB_HCA": "mlx5", "NCCL_ASYNC_ERROR_HANDLING": "1", "HOME": "/home/me"}
    chosen = host.choose(interface="eth0", **set_already)
    assert chosen.environment == {"NCCL_NET": "IB", "NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    assert {(setting.name, setting.value, setting.reason) for setting in chosen.kept} == {
        ("NCCL_IB_HCA", "mlx5", "set in the environment, and left as it is"),
        ("NCCL_ASYNC_ERROR_HANDLING", "1", "set in the environment, and left as it is"),
        ("NCCL_IB_TIMEOUT", "22", "set in nccl.conf, and left as it is"),
        ("NCCL_IB_RETRY_CNT", "5", "set in nccl.conf, and left as it is"),
    }


def test_a_plug_in_that_the_user_names_is_not_shut_out(host: Host) -> None:
    host.port("mlx5_0:1")
    assert "NCCL_NET" not in host.choose(NCCL_NET_PLUGIN="aws-ofi").environment
    assert host.choose(NCCL_NET_PLUGIN="none").environment["NCCL_NET"] == "IB"


def test_a_plug_in_that_nccl_finds_by_itself_is_not_shut_out_and_that_is_said(host: Host) -> None:
    host.port("mlx5_0:1")
    host.write("opt/nccl/lib/libnccl-net.so", "")
    path = "relative:/usr/lib:/opt/nccl/lib/"
    chosen = host.choose(LD_LIBRARY_PATH=path)
    assert "NCCL_NET" not in chosen.environment
    assert chosen.environment["NCCL_IB_HCA"] == "=mlx5_0:1"
    assert chosen.notes == (
        "n3: NCCL loads /opt/nccl/lib/libnccl-net.so (LD_LIBRARY_PATH), and may use its network instead of InfiniBand: NCCL_NET "
        "is left open, so look in NCCL's own log (NCCL_DEBUG=INFO) which one it takes; NCCL_NET_PLUGIN=none shuts it out",
    )
    assert chosen.as_data()["notes"] == list(chosen.notes)
    without = host.choose(LD_LIBRARY_PATH=path, NCCL_NET_PLUGIN="none")
    assert (without.environment["NCCL_NET"], without.notes) == ("IB", ())
    assert host.choose(LD_LIBRARY_PATH="/usr/lib").environment["NCCL_NET"] == "IB"
    host.write("etc/nccl.conf", "NCCL_NET=IB")
    assert host.choose(LD_LIBRARY_PATH=path).notes == ()


def test_ports_that_a_container_shows_and_cannot_open_are_an_error(host: Host) -> None:
    host.port("mlx5_0:1")
    host.roce("mlx5_1:1", IPV4)
    (host.root / "dev/infiniband/uverbs0").unlink()
    host.write("dev/infiniband/rdma_cm", "")
    with pytest.raises(NetworkError) as told:
        host.choose("auto")
    assert str(told.value) == (
        'n3: launch.network = "auto" uses InfiniBand (mlx5_0:1), and there is no /dev/infiniband/uverbs* to open it by: load '
        "ib_uverbs, or start the container with /dev/infiniband (docker, podman: --device /dev/infiniband; apptainer: --bind "
        '/dev/infiniband). launch.network = "socket" trains over TCP, far slower'
    )
    with pytest.raises(NetworkError, match=r'"roce" uses RoCE v2 \(mlx5_1:1\)'):
        host.choose("roce")
    assert host.choose("socket").kind == "socket"
    assert host.choose(NCCL_IB_DISABLE="1").kind == "socket"
    assert host.choose(NCCL_NET="Socket").environment.get("NCCL_NET") is None
    assert choose_network("auto", {}, host="n3", on_gpus=False, root=host.root).kind == "infiniband"


def test_infiniband_that_is_forbidden_and_wanted_is_an_error(host: Host) -> None:
    host.port("mlx5_0:1")
    assert host.choose(NCCL_IB_DISABLE="1").kind == "socket"
    with pytest.raises(NetworkError, match="NCCL_IB_DISABLE=1 is set in the environment, which forbids it: unset one"):
        host.choose("infiniband", NCCL_IB_DISABLE="1")


def test_the_interface_of_the_meeting_point_is_told_with_its_speed(host: Host) -> None:
    host.write("sys/class/net/bond0/speed", "25000")
    host.write("sys/class/net/veth1/speed", "-1")
    assert (host.choose(interface="bond0").interface, host.choose(interface="bond0").interface_mbit) == ("bond0", 25000)
    assert host.choose(interface="veth1").interface_mbit is None


def test_the_interface_that_leads_to_an_address_is_found() -> None:
    own = [
        (name, one.address)
        for name, known in psutil.net_if_addrs().items()
        for one in known
        if one.family == socket.AF_INET and not one.address.startswith("127.")
    ]
    if not own:
        pytest.skip("this machine has no network")
    assert {interface_towards(address) for _, address in own} <= {name for name, _ in own}
    assert interface_towards(own[0][1]) == own[0][0]
    assert interface_towards("no such host.invalid") is None


def test_a_host_that_calls_itself_by_its_loopback_device_goes_by_its_default_route(host: Host) -> None:
    assert interface_towards("127.0.1.1", root=host.root) is None
    host.write("proc/net/route", "Iface\tDestination\tGateway\nib0\t0000A8C0\t0\neth3\t00000000\t0100A8C0")
    assert interface_towards("127.0.1.1", root=host.root) == "eth3"
