"""Rooms as they are usually written: a dict that makes a queue for each new name.

It never drops a room, takes any name, and limits neither rooms nor payloads. It also has every
fault of steps/step0_naive.py. Run `uvicorn lessons.naive.rooms_server:app`.
"""

import asyncio
from collections import defaultdict

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

app = FastAPI()
rooms: defaultdict[str, asyncio.Queue[str]] = defaultdict(asyncio.Queue)


@app.websocket("/ws/{room}/producer")
async def producer(websocket: WebSocket, room: str) -> None:
    await websocket.accept()
    try:
        while True:
            payload = await websocket.receive_text()
            await rooms[room].put(payload)
            await websocket.send_text(payload)
    except WebSocketDisconnect:
        pass


@app.websocket("/ws/{room}/consumer")
async def consumer(websocket: WebSocket, room: str) -> None:
    await websocket.accept()
    try:
        while True:
            await websocket.send_text(await rooms[room].get())
    except WebSocketDisconnect:
        pass


@app.get("/stats")
async def stats() -> dict[str, dict[str, int]]:
    return {"rooms": {name: queue.qsize() for name, queue in rooms.items()}}
