"""Cut the network between a server and two of its clients, under load, and count what is lost.

`python -m tests.cut_off ack_server.py 45` does it for 45 seconds, in networks of its own, if the system
(Linux) lets it have some. It prints a line such as `3016 echoed, 0 lost, 1 twice`. With `PING=1`, the server
sends pings every second, and waits as long for an answer. Without a number of seconds, the cut lasts until
the server has closed the connections of both clients.
"""

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, closing, nullcontext, suppress

from websockets.asyncio.client import connect

from tests.kit.clients import CONNECTING, receive
from tests.kit.commands import CONSUMER, PRODUCER, SERVERS, with_options
from tests.kit.namespaces import ALONE, Cable
from tests.kit.scripts import Script
from tests.kit.servers import Server, running, tracebacks
from tests.kit.waiting import TIMEOUT, until

AT_ONCE = 20  # payloads that the cut-off producer sends before, and during, the cut


class Load:
    """A producer and a consumer on this side of the cable, and a producer and a consumer on the other."""

    def __init__(self, server: Server, cable: Cable, stack: ExitStack) -> None:
        self.server = server
        far = f"ws://10.9.0.1:{server.port}"
        options = ["--ack"] if server.acks else []
        self.near_consumer = Script(server.url(CONSUMER), *options)
        place = [*cable.place(), "env", "NO_PROXY=10.9.0.1"]
        self.far_consumer = Script(far + CONSUMER, *options, place=place)
        self.far_producer = Script(far + PRODUCER, "-", stdin=subprocess.PIPE, place=place)
        for script in (self.near_consumer, self.far_consumer, self.far_producer):
            stack.callback(script.close)
        self.numbers = itertools.count()
        self.sent: set[str] = set()
        self.echoed: set[str] = set()
        self.flowing = asyncio.Event()

    def received(self) -> Counter[str]:
        return Counter(self.near_consumer.lines + self.far_consumer.lines)

    def next_payload(self) -> str:
        payload = str(next(self.numbers))
        self.sent.add(payload)
        return payload

    async def produce(self) -> None:
        """Send payloads from this side, one after the other."""
        async with connect(self.server.url(PRODUCER), **CONNECTING) as websocket:  # type: ignore[arg-type]
            while await self.flowing.wait():
                payload = self.next_payload()
                await websocket.send(payload)
                assert await receive(websocket) == payload
                self.echoed.add(payload)
                await asyncio.sleep(0.01)

    def produce_there(self) -> set[str]:
        """Send payloads from the other side. The script ends only when it has a receipt for each of them."""
        payloads = {self.next_payload() for _ in range(AT_ONCE)}
        self.far_producer.write("".join(f"{payload}\n" for payload in payloads))
        self.echoed.update(payloads)
        return payloads

    async def flow(self, consumer: Script) -> None:
        """Wait until the consumer gets payloads."""
        count = len(consumer.lines)
        await until(lambda: len(consumer.lines) > count + 10, "payloads to arrive", 6 * TIMEOUT)

    async def until_received(self, payloads: set[str]) -> None:
        await until(lambda: self.received().keys() >= payloads, "all payloads to arrive", 6 * TIMEOUT)


async def main(name: str, seconds: float | None) -> None:
    options = ["--host", "0.0.0.0"]
    if "PING" in os.environ:
        options += ["--ws", "tests.short_pings:Protocol"]
    with ExitStack() as stack:
        cable = stack.enter_context(closing(Cable()))
        server = stack.enter_context(running(with_options(SERVERS[name], *options)))
        load = Load(server, cable, stack)
        producing = asyncio.create_task(load.produce())
        load.flowing.set()
        load.produce_there()
        await load.flow(load.near_consumer)
        await load.flow(load.far_consumer)
        load.flowing.clear()
        await load.until_received(load.sent)

        before = load.sent.copy()
        cable.pull()
        end = time.monotonic() + (seconds or 0)
        unsent = load.produce_there()
        load.flowing.set()
        await load.flow(load.near_consumer)
        at_risk: set[str] = set()
        with suppress(AssertionError) if seconds else nullcontext():
            await until(
                lambda: len(server.connections()) == 2, "the server to notice", seconds or 6 * TIMEOUT
            )
            if server.acks:
                # The other consumer gets what the one that is cut off has not acknowledged.
                await load.until_received(load.echoed - unsent)
        if not server.acks:
            # What the server has written to the consumer that is cut off may be lost.
            at_risk = load.sent - before - unsent
        await asyncio.sleep(max(0, end - time.monotonic()))
        cable.plug()

        await load.flow(load.far_consumer)
        load.flowing.clear()
        assert load.far_producer.process.stdin
        load.far_producer.process.stdin.close()
        assert await load.far_producer.ends(6 * TIMEOUT) == 0
        await load.until_received(load.sent - at_risk)
        producing.cancel()
        received = load.received()
        assert tracebacks(server.log) == 0
    lost = len(load.echoed - received.keys())
    twice = sum(count > 1 for count in received.values())
    print(f"{len(load.echoed)} echoed, {lost} lost, {twice} twice")


if __name__ == "__main__":
    if sys.argv[1] == "alone":
        asyncio.run(main(sys.argv[2], float(sys.argv[3]) if sys.argv[3:] else None))
    else:
        os.execvp(ALONE[0], [*ALONE, sys.executable, "-m", "tests.cut_off", "alone", *sys.argv[1:]])
