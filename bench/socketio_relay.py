"""The same relay on python-socketio, to compare with: an event for a payload, an event back for its echo.

Run `python bench/socketio_relay.py 8000`. At most once: a consumer that leaves takes a payload with it.
"""

import asyncio
import sys

import socketio
import uvicorn

sio = socketio.AsyncServer(async_mode="asgi", async_handlers=False)  # a task for each event is no faster
queue: asyncio.Queue[object] = asyncio.Queue(1000)
forwarders: dict[str, asyncio.Task[None]] = {}


async def forward(sid: str) -> None:
    while True:
        await sio.emit("payload", await queue.get(), to=sid)


@sio.event
async def connect(sid: str, environ: dict[str, str]) -> None:
    if "role=consumer" in environ["QUERY_STRING"]:
        forwarders[sid] = asyncio.create_task(forward(sid))


@sio.event
async def payload(sid: str, payload: object) -> None:
    await queue.put(payload)
    await sio.emit("payload", payload, to=sid)


@sio.event
async def disconnect(sid: str, reason: str) -> None:
    if sid in forwarders:
        forwarders.pop(sid).cancel()


if __name__ == "__main__":
    uvicorn.run(socketio.ASGIApp(sio), port=int(sys.argv[1]), log_level="warning")
