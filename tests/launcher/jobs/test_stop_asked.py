"""Stop signals to this process."""

import asyncio
import os
import signal

import pytest

from launcher.jobs.stop_asked import StopAsked

_TIMEOUT = 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_the_first_signal_counts_and_wakes_whoever_waits(number: signal.Signals) -> None:
    async def run() -> None:
        with StopAsked(lambda text: None) as stop:
            assert not await stop.sleep(0.0)
            waiting = asyncio.ensure_future(stop.sleep(600))
            await asyncio.sleep(0)
            os.kill(os.getpid(), number)
            assert await asyncio.wait_for(waiting, _TIMEOUT)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.01)
            assert stop.signal == number
            assert not stop.at_once.is_set()

    asyncio.run(run())


def test_a_second_ctrl_c_means_at_once() -> None:
    said: list[str] = []

    async def run() -> None:
        with StopAsked(said.append) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.wait_for(stop.asked.wait(), _TIMEOUT)
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.wait_for(stop.at_once.wait(), _TIMEOUT)

    asyncio.run(run())
    assert said == [
        "Stopping after this step and saving; Ctrl-C again ends at once.",
        "Ending at once. The last complete checkpoint stays.",
    ]


def test_afterwards_signals_mean_what_they_meant() -> None:
    async def run() -> None:
        with StopAsked(lambda text: None):
            pass

    asyncio.run(run())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
