"""Step 3: number the payloads, so that one that could not be sent goes back to the front.

Holds: no payload is lost while the server waits to send it. Still lost: what was already written
to the socket of a consumer that dies (lessons/ack_server.py prevents that).
Still fails: bad input reaches the consumers, and a binary frame is a traceback in the log.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left


class Channel:
    """A queue, first in, first out, that takes payloads back at the front."""

    def __init__(self) -> None:
        # The lowest number comes out first, so a payload that goes back is the next one out.
        self.queue: asyncio.PriorityQueue[tuple[int, str]] = asyncio.PriorityQueue()
        self.numbers = itertools.count()

    async def put(self, payload: str) -> None:
        """Queue a payload."""
        self.queue.put_nowait((next(self.numbers), payload))

    async def deliver(self, handle: Callable[[str], Awaitable[object]]) -> None:
        """Call `handle` with each payload. If it fails or is cancelled, the payload goes back."""
        while True:
            number, payload = await self.queue.get()
            try:
                await handle(payload)
            except BaseException:
                self.queue.put_nowait((number, payload))
                raise


app = FastAPI()
channel = Channel()


@app.websocket("/ws/producer")
async def producer(websocket: WebSocket) -> None:
    await websocket.accept()
    # If the producer does not read its receipts, uvicorn cancels this endpoint when it stops.
    with suppress(asyncio.CancelledError):
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            payload = message["text"]
            await channel.put(payload)
            # The receipt. The payload is queued, even if the producer has left meanwhile.
            with suppress(*GONE):
                await websocket.send_text(payload)


async def send_payloads(websocket: WebSocket) -> None:
    """Send payloads until the consumer leaves. One that cannot be sent goes back to the front."""
    with suppress(*GONE):
        await channel.deliver(websocket.send_text)


@app.websocket("/ws/consumer")
async def consumer(websocket: WebSocket) -> None:
    await websocket.accept()
    # If the consumer does not read its payloads, uvicorn cancels this endpoint when it stops.
    with suppress(asyncio.CancelledError):
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(send_payloads(websocket))
            # Only receive() tells us that the consumer has left, or that uvicorn is stopping.
            while (await websocket.receive())["type"] != "websocket.disconnect":
                pass
            sender.cancel()
