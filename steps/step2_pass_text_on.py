"""Step 2: receive from the producer in the same way, and pass its text on unchanged.

Holds: a producer may leave at any time, and every consumer gets exactly what the producer sent.
Still fails: if a consumer leaves while a payload is being sent to it, that payload is lost.
"""

import asyncio
from contextlib import suppress

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left

app = FastAPI()
queue: asyncio.Queue[str] = asyncio.Queue()


@app.websocket("/ws/producer")
async def producer(websocket: WebSocket) -> None:
    await websocket.accept()
    # If the producer does not read its receipts, uvicorn cancels this endpoint when it stops.
    with suppress(asyncio.CancelledError):
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            payload = message["text"]
            await queue.put(payload)
            # The receipt. The payload is queued, even if the producer has left meanwhile.
            with suppress(*GONE):
                await websocket.send_text(payload)


async def send_payloads(websocket: WebSocket) -> None:
    """Send payloads until the consumer leaves."""
    with suppress(*GONE):
        while True:
            payload = await queue.get()
            await websocket.send_text(payload)


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
