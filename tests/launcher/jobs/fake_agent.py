"""An agent that is played by a test: it says and hears what the test wants."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from launcher.jobs.agents.handshake import Seal, new_nonce, take_answer
from launcher.jobs.agents.head import Head
from launcher.jobs.agents.protocol import LONGEST_LINE, Ended, Hello, Message, Start, Started, Welcome, decode, encode

T = TypeVar("T", bound=Message)

TOKEN = "secret"


def in_time(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a test that must come to its end."""

    async def limited() -> None:
        async with asyncio.timeout(90):
            await test()

    try:
        asyncio.run(limited())
    finally:
        FakeAgent.kept.clear()


@dataclass
class FakeAgent:
    """One end of a connection to the head."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    seal: Seal | None = None
    """Once both ends know each other."""
    kept: ClassVar[list[FakeAgent]] = []
    """Those of the running test: one that nobody holds hangs up."""

    def __post_init__(self) -> None:
        self.kept.append(self)

    @classmethod
    async def connect(cls, head: Head) -> FakeAgent:
        """Connects, and says nothing."""
        return cls(*await asyncio.open_connection("127.0.0.1", head.port, limit=LONGEST_LINE))

    @classmethod
    async def meet(cls, head: Head) -> FakeAgent:
        """Connects, and proves that it knows the token."""
        agent = await cls.connect(head)
        nonce = new_nonce()
        agent.writer.write(nonce + b"\n")
        agent.seal = take_answer(TOKEN, nonce, (await agent.reader.readline())[:-1])
        return agent

    @classmethod
    async def come(cls, head: Head, host: str, index: int = 0, **hello: Any) -> FakeAgent:
        """Connects, and is welcome."""
        agent = await cls.meet(head)
        agent.say_hello(host, index, **hello)
        await agent.hear(Welcome)
        return agent

    def say_hello(self, host: str, index: int = 0, **hello: Any) -> None:
        fields: dict[str, Any] = {
            "attempt": 1,
            "host": host,
            "index": index,
            "agent": f"{host}-{index}",
            "addresses": (f"address-of-{host}",),
            "port": 29500,
            "sent": time.time(),
        }
        self.say(Hello(**{**fields, **hello}))

    def say(self, message: Message) -> None:
        assert self.seal is not None
        self.writer.write(self.seal.seal(encode(message)) + b"\n")

    async def hear(self, kind: type[T]) -> T:
        """The next message but beats, which must be of this kind."""
        while True:
            line = await self.reader.readline()
            assert line, "the head has hung up"
            if line != b"{}\n":
                assert self.seal is not None
                message = decode(self.seal.open(line[:-1]))
                assert isinstance(message, kind), message
                return message

    async def start(self) -> Start:
        """Does as if it started the ranks that it is given."""
        order = await self.hear(Start)
        self.say(Started())
        return order

    def end_rank(self, rank: int, code: int = 0, **fields: Any) -> None:
        """Says that a rank has ended."""
        now = time.time()
        known = {"at": now, "sent": now, "record": None, "last_line": "", "ended_by_us": False}
        self.say(Ended(**{"rank": rank, "code": code, **known, **fields}))

    async def is_hung_up_on(self) -> bool:
        """Waits for the end of the connection; False where something is said before."""
        with contextlib.suppress(ConnectionError):
            while line := await self.reader.readline():
                if line != b"{}\n":
                    return False
        return True

    def close(self) -> None:
        self.writer.close()
