"""Send many payloads while processes are killed."""

import asyncio
import itertools
from collections import deque
from contextlib import suppress

from websockets.exceptions import ConnectionClosed, InvalidHandshake

from tests.kit.clients import client, receive
from tests.kit.commands import CONSUMER, PRODUCER
from tests.kit.scripts import Script
from tests.kit.servers import Server
from tests.kit.waiting import TIMEOUT, until


class Storm:
    """Producers and consumers at two servers, and which payloads were echoed and received."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self.echoed: set[str] = set()
        self.numbers = itertools.count()
        self.ending = False
        self.urls = [server.url(CONSUMER + "?prefetch=8") for server in servers * 2]
        self.consumers = [Script(url, "--ack") for url in self.urls]
        self.ended: list[Script] = []

    def received(self) -> list[str]:
        """Return what the consumers have printed. They print a payload before they acknowledge it."""
        return [line for script in (*self.ended, *self.consumers) for line in script.lines]

    def revive(self) -> None:
        """Replace the consumers that have ended."""
        for slot, script in enumerate(self.consumers):
            if script.process.poll() is not None:
                self.ended.append(script)
                self.consumers[slot] = Script(self.urls[slot], "--ack")

    async def produce(self, start: int) -> None:
        """Send until the end. Payloads that were not echoed are sent again, to the other server."""
        unechoed: deque[str] = deque()
        for turn in itertools.count(start):
            with suppress(ConnectionClosed, InvalidHandshake, OSError, EOFError):
                async with client(self.servers[turn % 2], PRODUCER) as websocket:
                    while unechoed or not self.ending:
                        while not self.ending and len(unechoed) < 20:
                            unechoed.append(str(next(self.numbers)))
                        for payload in unechoed:
                            await websocket.send(payload)
                        while unechoed:
                            assert await receive(websocket) == unechoed[0]
                            self.echoed.add(unechoed.popleft())
                        await asyncio.sleep(0.02)  # a load, but not all that this machine can bear
                    return
            await asyncio.sleep(0.05)

    async def flow(self) -> None:
        """Wait until 100 more payloads were echoed, and 100 more received."""
        echoed, received = len(self.echoed), len(self.received())

        def flows() -> bool:
            self.revive()
            return len(self.echoed) > echoed + 100 and len(self.received()) > received + 100

        await until(flows, "payloads to come and go", 2 * TIMEOUT)

    def close(self) -> None:
        for script in (*self.ended, *self.consumers):
            script.close()
