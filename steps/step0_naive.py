"""Step 0: what most tutorials show. A producer fills a queue, and a consumer drains it.

Still fails: Ctrl+C hangs, a consumer that has left swallows a payload, and a consumer that has said
something is closed with 1011. steps/README.md shows each fault, and the step that fixes it.
"""

import asyncio

from fastapi import FastAPI, WebSocket

app = FastAPI()
queue: asyncio.Queue[object] = asyncio.Queue()


@app.websocket("/ws/producer")
async def producer(websocket: WebSocket) -> None:
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
