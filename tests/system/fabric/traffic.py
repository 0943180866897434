"""Traffic that is not ours: run in the namespace of a foreign host, with the standard library alone.

    traffic.py udp ADDRESS             datagrams without end, as fast as the host's link takes them
    traffic.py tcp ADDRESS CONNECTIONS streams without end, sharing links as TCP does
    traffic.py sink                    takes in such streams

Says `ready` once it runs, and ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys

PORT = 9_009
_UDP_SEGMENT = 103
"""Linux: one call sends many datagrams of this size. A process that makes each on its own takes a core for it."""
_SEGMENT_BYTES = 1_472
_SEGMENTS = 10
_CHUNK = bytes(64 * 1024)


def main(words: list[str]) -> None:
    """Runs what `words` say until standard input ends."""
    with contextlib.suppress(PermissionError):  # what it sends must not depend on how busy the machine is
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    if words[0] == "udp":
        _send_datagrams(words[1])
    elif words[0] == "tcp":
        _send_streams(words[1], int(words[2]))
    else:
        _take_in()


def _ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


def _send_datagrams(address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT_BYTES)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * _SEGMENTS * _SEGMENT_BYTES)
        sender.connect((address, PORT))
        payload = bytes(_SEGMENTS * _SEGMENT_BYTES)
        _ready()
        while not _ended([sender]):
            sender.send(payload)


def _send_streams(address: str, connections: int) -> None:
    with contextlib.ExitStack() as stack:
        senders = [
            stack.enter_context(socket.create_connection((address, PORT), timeout=10)) for _ in range(connections)
        ]
        for sender in senders:
            sender.setblocking(False)
        _ready()
        while not _ended(senders):
            for sender in senders:
                with contextlib.suppress(BlockingIOError):
                    sender.send(_CHUNK)


def _ended(senders: list[socket.socket]) -> bool:
    """Waits until one of them can send, or standard input ends."""
    readable, _, _ = select.select([sys.stdin], senders, [])
    return bool(readable)


def _take_in() -> None:
    with socket.create_server(("", PORT)) as server:
        _ready()
        streams: list[socket.socket] = []
        while True:
            readable, _, _ = select.select([sys.stdin, server, *streams], [], [])
            if sys.stdin in readable:
                return
            if server in readable:
                streams.append(server.accept()[0])
            for stream in [stream for stream in streams if stream in readable]:
                if not stream.recv(len(_CHUNK)):
                    streams.remove(stream)
                    stream.close()


if __name__ == "__main__":
    main(sys.argv[1:])
