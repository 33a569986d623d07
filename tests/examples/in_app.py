"""An app that produces and consumes in the server itself, as README.md shows it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import server


async def measure() -> None:
    while True:
        await server.channel.put('{"temperature": 20}')
        await asyncio.sleep(1)


async def save(payload: str) -> None:
    print("saved", payload, flush=True)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with server.lifespan(app), asyncio.TaskGroup() as group:
        tasks = [measure(), server.channel.deliver(save)]
        running = [group.create_task(task) for task in tasks]
        yield
        for task in running:
            task.cancel()


app = FastAPI(lifespan=lifespan)
app.mount("/queue", server.app)
