"""What head and agents say to one another, and how they see that the other end is gone."""

import asyncio
import contextlib
import socket
from collections.abc import Coroutine

import pytest

from launcher.jobs.agents import protocol
from launcher.jobs.agents.handshake import Seal, new_nonce, take_answer
from launcher.jobs.agents.protocol import (
    LONGEST_HELLO,
    Beats,
    Connection,
    End,
    Ended,
    Hello,
    Lines,
    Message,
    ProtocolError,
    Release,
    Signal,
    Start,
    Started,
    decode,
    encode,
    hang_up_on_the_silent,
)

_MESSAGES: list[Message] = [
    Hello(attempt=1, host="n1", index=0, agent="x", addresses=("10.0.0.1",), port=1, sent=1.5),
    Start(
        ranks=(0, 1),
        first_local_rank=0,
        ranks_on_host=2,
        num_ranks=4,
        command=("python", "-c", "print('\u00fc')"),
        environ={"A": "not text: \udcff"},
        directory="logs",
        working_directory="/",
        master_address="10.0.0.1",
        master_port=1,
        max_log_bytes=1,
    ),
    Ended(rank=1, code=-9, at=1, sent=2.0, record={"message": "x"}, last_line="", ended_by_us=True),
    Ended(rank=1, code=0, at=1, sent=2.0, record=None, last_line="\n", ended_by_us=False),
    Lines(lines=([0, "text\nof two lines"], [1, "\u6771"])),
    End(at_once=True),
    Release(),
    Started(),
]


@pytest.mark.parametrize("message", _MESSAGES)
def test_a_message_comes_as_it_was_sent(message: Message) -> None:
    line = encode(message)
    assert b"\n" not in line
    assert decode(line) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"GET / HTTP/1.1",
        b"\xff\x00",
        b"[1]",
        b"{}",
        b"7",
        b'{"Signal": {"number": 1}, "Release": {}}',
        b'{"Signal": {}}',
        b'{"Signal": {"number": "15"}}',
        b'{"Signal": {"number": true}}',
        b'{"Signal": {"number": 15, "more": 1}}',
        b'{"Signal": [15]}',
        b'{"Nothing": {}}',
        b'{"Lines": {"lines": {"a": 1}}}',
        b"[" * 50_000,
    ],
)
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(line)


class _End:
    """A connection of this process whose other end is a plain socket."""

    def __init__(self, *, longest: int = protocol.LONGEST_LINE) -> None:
        self.heard: list[Message] = []
        self.ended: list[str] = []
        self.connection = Connection(
            on_message=lambda _, message: self.heard.append(message),
            on_end=lambda _, why: self.ended.append(why),
            token="secret",
            comes=False,
            longest=longest,
        )
        self.far, self._near = socket.socketpair()
        self.far.settimeout(60)

    async def open(self) -> "_End":
        await asyncio.get_running_loop().create_connection(lambda: self.connection, sock=self._near)
        return self

    async def greet(self) -> Seal:
        """Has the other end prove that it knows the token; what it says from now on is to be sealed."""
        nonce = new_nonce()
        self.far.sendall(nonce + b"\n")
        return take_answer("secret", nonce, (await asyncio.to_thread(self.far.recv, 1000))[:-1])

    async def end(self) -> str:
        """Why it ended."""
        while not self.ended:
            await asyncio.sleep(0)
        return self.ended[0]


def _run(test: Coroutine[None, None, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(limited())


def test_messages_are_found_however_their_bytes_come() -> None:
    async def test() -> None:
        end = await _End().open()
        seal = await end.greet()
        data = b"".join(b"{}\n" + seal.seal(encode(message)) + b"\n" for message in _MESSAGES)
        for first in range(0, len(data), 7):
            end.far.send(data[first : first + 7])
            await asyncio.sleep(0)
        end.far.close()
        assert await end.end() == "its connection ended"
        assert end.heard == _MESSAGES

    _run(test())


@pytest.mark.parametrize("data", [b"x" * 1000, b'{"Signal": 1}', b"no"])
def test_who_does_not_speak_as_it_should_is_hung_up_on(data: bytes) -> None:
    async def test() -> None:
        end = await _End(longest=500).open()
        seal = await end.greet()
        end.far.sendall(b"{}\n" + seal.seal(data) + b"\n{}\n")
        assert "it does not speak as it should" in await end.end()
        assert end.heard == []

    _run(test())


@pytest.mark.parametrize("data", [b"x" * (LONGEST_HELLO + 1), encode(Release()) + b"\n", b"\n", b"x" * 32 + b"\nno\n"])
def test_a_stranger_is_hung_up_on_whatever_it_says(data: bytes) -> None:
    async def test() -> None:
        end = await _End().open()
        end.far.sendall(data)
        await end.end()
        assert end.heard == []

    _run(test())


def test_beats_come_while_the_event_loop_is_held_up() -> None:
    async def test() -> None:
        end = await _End().open()
        beats = Beats()
        beats.add(end.connection)
        beats.start(0.01)
        data = b""
        while len(data) < 3 * len(b"{}\n"):
            data += end.far.recv(1000)  # blocks, and with it the loop
        beats.stop()
        assert data == b"{}\n" * (len(data) // 3)

    _run(test())


def test_no_beat_stands_within_another_message() -> None:
    async def test() -> None:
        end = await _End().open()
        seal = await end.greet()
        beats = Beats()
        beats.add(end.connection)
        beats.start(0.0005)
        received = b""
        sent = [Lines(lines=([number, "x" * 100_000],)) for number in range(100)]
        end.far.setblocking(False)
        for message in sent:
            end.connection.send(message)
            while end.connection.unsent_bytes:
                received += await asyncio.get_running_loop().sock_recv(end.far, 1 << 16)
        while received.count(b"Lines") < len(sent) or not received.endswith(b"}\n"):
            received += await asyncio.get_running_loop().sock_recv(end.far, 1 << 16)
        beats.stop()
        assert [decode(seal.open(line)) for line in received.splitlines() if line != b"{}"] == sent

    _run(test())


def test_one_that_is_hung_up_on_before_it_is_connected_is_not_kept() -> None:
    async def test() -> None:
        end = _End()
        end.connection.hang_up("too many")
        await end.open()
        assert await end.end() == "too many"

    _run(test())


def test_a_beat_to_one_that_is_gone_does_no_harm() -> None:
    async def test() -> None:
        end = await _End().open()
        end.connection.hang_up("enough")
        end.connection.beat()
        assert await end.end() == "enough"
        end.connection.beat()
        end.connection.send(Release())
        assert not end.connection.is_open

    _run(test())


def _hung_up_after(gaps_s: list[float], monkeypatch: pytest.MonkeyPatch) -> str:
    """Why a silent connection was hung up on, where this process came to look after each of these gaps; at first "" ."""

    class Clock:
        now = 0.0

        def time(self) -> float:
            return self.now

    clock, left = Clock(), list(gaps_s)

    async def sleep(seconds: float) -> None:
        if not left:
            raise asyncio.CancelledError
        clock.now += left.pop(0)

    connection = Connection(on_message=lambda *_: None, on_end=lambda *_: None, token="secret", comes=False)
    with monkeypatch.context() as patch:
        patch.setattr(protocol.asyncio, "sleep", sleep)
        patch.setattr(protocol.asyncio, "get_running_loop", lambda: clock)
        watch = hang_up_on_the_silent(lambda: [connection], 12.0)  # looks every two seconds
        with pytest.raises(asyncio.CancelledError):
            watch.send(None)
    return connection.why


def test_silence_is_counted_in_time_in_which_this_process_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _hung_up_after([2.0] * 6, monkeypatch) == ""
    assert _hung_up_after([2.0] * 7, monkeypatch) == "nothing heard for 12 s"
    assert _hung_up_after([2.0, 3600.0, 2.0], monkeypatch) == ""  # it was stopped for an hour
    assert _hung_up_after([3600.0] * 4, monkeypatch) == "nothing heard for 12 s"  # it was not stopped each time


def test_json_without_end_is_not_kept() -> None:
    """One that is welcome may say long things, but not without limit."""

    async def test() -> None:
        end = await _End(longest=1 << 16).open()
        await end.greet()
        loop = asyncio.get_running_loop()
        end.far.setblocking(False)
        with contextlib.suppress(OSError):
            while True:
                await loop.sock_sendall(end.far, b"x" * 10_000)
        assert "it does not speak as it should" in await end.end()

    _run(test())


def test_a_signal_is_a_number() -> None:
    assert decode(encode(Signal(number=15))) == Signal(number=15)
