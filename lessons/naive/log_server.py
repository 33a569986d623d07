"""A log as it is usually written first: replay the history, then subscribe.

It loses events in between, has no epoch, tells a consumer nothing about where it is, drops events
silently when a buffer is full, and runs a job inside the connection that asked for it. Run
`uvicorn lessons.naive.log_server:app`.
"""

import asyncio
import json
import secrets
from collections import defaultdict
from typing import Annotated, Any

from fastapi import Body, FastAPI, WebSocket, WebSocketDisconnect

app = FastAPI()
histories: defaultdict[str, list[str]] = defaultdict(list)
buffers: defaultdict[str, set[asyncio.Queue[str]]] = defaultdict(set)
jobs: dict[str, str] = {}


@app.websocket("/ws/{stream}/producer")
async def producer(websocket: WebSocket, stream: str) -> None:
    await websocket.accept()
    try:
        while True:
            payload = await websocket.receive_text()
            offset = len(histories[stream]) + 1
            event = f'{{"offset": {offset}, "payload": {payload}}}'
            histories[stream].append(event)
            for buffer in buffers[stream]:
                if not buffer.full():
                    buffer.put_nowait(event)
            await websocket.send_text(payload)
    except WebSocketDisconnect:
        pass


async def replay_and_follow(websocket: WebSocket, stream: str, after: int) -> None:
    for event in histories[stream][after:]:
        await websocket.send_text(event)
    buffer: asyncio.Queue[str] = asyncio.Queue(100)
    buffers[stream].add(buffer)
    try:
        while True:
            await websocket.send_text(await buffer.get())
    finally:
        buffers[stream].discard(buffer)


async def run_job(websocket: WebSocket, text: str) -> None:
    for offset, word in enumerate(f"You asked: {text}".split(), 1):
        await websocket.send_json({"offset": offset, "payload": word})
        await asyncio.sleep(0.05)
    await websocket.send_json({"end": "done"})


@app.websocket("/ws/{stream}/consumer")
async def consumer(websocket: WebSocket, stream: str, after: str = "") -> None:
    await websocket.accept()
    try:
        if stream in jobs:
            await run_job(websocket, jobs[stream])
        else:
            offset = int(after.rpartition(":")[2]) if after else len(histories[stream])
            await replay_and_follow(websocket, stream, offset)
    except WebSocketDisconnect:
        pass


@app.post("/jobs")
async def start_job(request: Annotated[Any, Body()]) -> dict[str, str]:
    name = f"job-{secrets.token_hex(4)}"
    jobs[name] = request if isinstance(request, str) else json.dumps(request)
    return {"stream": name}
