"""Step 1: receive from the consumer all the time, and send to it from a task beside that.

Holds: Ctrl+C ends all consumers, a consumer that leaves is noticed at once and takes no payload
with it, and a consumer may say something.
Still fails: a producer that leaves is a traceback in the log, and payloads come out rewritten.
"""

import asyncio
from contextlib import suppress

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left

app = FastAPI()
queue: asyncio.Queue[object] = asyncio.Queue()


@app.websocket("/ws/producer")
async def producer(websocket: WebSocket) -> None:
    await websocket.accept()
    while True:
        payload = await websocket.receive_json()
        await queue.put(payload)
        await websocket.send_json(payload)


async def send_payloads(websocket: WebSocket) -> None:
    """Send payloads until the consumer leaves."""
    with suppress(*GONE):
        while True:
            payload = await queue.get()
            await websocket.send_json(payload)


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
