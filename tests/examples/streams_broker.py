"""Another broker for pubsub_server.py: a Redis Stream, from which each process reads all entries."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis

from lessons import pubsub_server

app = pubsub_server.app


class StreamBroker(pubsub_server.Broker):
    def __init__(self) -> None:
        self.redis: Any = Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)

    @asynccontextmanager
    async def connect(self, handle: Callable[[str | None], Awaitable[None]]) -> AsyncIterator[None]:
        newest = await self.redis.xrevrange("pubsub", count=1)
        task = asyncio.create_task(self.read(newest[0][0] if newest else "0", handle))
        yield
        task.cancel()

    async def read(self, last: str, handle: Callable[[str | None], Awaitable[None]]) -> None:
        while True:
            for _, entries in await self.redis.xread({"pubsub": last}, block=1000):
                for number, fields in entries:
                    await handle(fields["envelope"])
                    last = number

    async def send(self, envelope: str) -> None:
        await self.redis.xadd("pubsub", {"envelope": envelope}, maxlen=10_000)


pubsub_server.broker = StreamBroker()
