"""An app that produces and consumes in the server itself, as README.md shows it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import server

log = logging.getLogger("uvicorn.error")


async def measure() -> None:
    while True:
        await server.channel.put('{"temperature": 20}')
        await asyncio.sleep(1)


async def save(payload: str) -> None:
    print("saved", payload, flush=True)


async def consume() -> None:
    while True:
        try:
            await server.channel.deliver(save)
        except Exception:
            log.exception("a payload went back to the queue")
            await asyncio.sleep(1)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with server.lifespan(app), asyncio.TaskGroup() as group:
        running = [group.create_task(task) for task in (measure(), consume())]
        yield
        for task in running:
            task.cancel()


app = FastAPI(lifespan=lifespan)
app.mount("/queue", server.app)
