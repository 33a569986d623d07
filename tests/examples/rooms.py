"""Server code that takes part in rooms, as lessons/rooms_server.md shows it."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from lessons import rooms_server
from lessons.rooms_server import rooms

log = logging.getLogger("uvicorn.error")


async def answer(payload: str) -> None:
    """Stand in for a language model: put one word after another in the room `answers`."""
    question = json.loads(payload)["question"]
    for word in f"You asked: {question}".split():
        await rooms["answers"].put(json.dumps(word))
        await asyncio.sleep(0.05)


async def consume(name: str, handle: Callable[[str], Awaitable[object]]) -> None:
    """Hand each payload of a room to `handle`. If it fails, try the same payload again."""
    while True:
        try:
            await rooms[name].deliver(handle)
        except Exception:
            log.exception("a payload went back to room %s", name)
            await asyncio.sleep(1)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with rooms_server.lifespan(app), asyncio.TaskGroup() as group:
        task = group.create_task(consume("questions", answer))
        yield
        task.cancel()


app = FastAPI(lifespan=lifespan)
app.mount("/", rooms_server.app)
