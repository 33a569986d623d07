"""The demo as tutorials write it. Each caveat in the README is a test that this server fails."""

import asyncio

from fastapi import FastAPI, WebSocket

app = FastAPI()
queue: asyncio.Queue[object] = asyncio.Queue()


@app.websocket("/ws/producer")
async def producer(websocket: WebSocket) -> None:
    """Receive payloads and put them into the queue."""
    await websocket.accept()
    while True:
        payload = await websocket.receive_json()
        await queue.put(payload)
        await websocket.send_json(payload)


@app.websocket("/ws/consumer")
async def consumer(websocket: WebSocket) -> None:
    """Broadcast the payloads in the queue to all consumers."""
    await websocket.accept()
    while True:
        payload = await queue.get()
        await websocket.send_json(payload)
