"""The demo with many workers as tutorials write it: a manager's queue behind asyncio.to_thread().

Run `python lessons/naive/multiproc_server.py PORT`.
"""

import asyncio
import os
import sys
from multiprocessing.managers import BaseManager
from queue import Queue
from typing import Any

import uvicorn
from fastapi import FastAPI, WebSocket

app = FastAPI()


class QueueManager(BaseManager):
    pass


payloads: Queue[Any] = Queue()  # each process has one, but only the manager's is used


def manager_queue() -> Queue[Any]:
    return payloads


def queue() -> Any:
    QueueManager.register("queue")
    manager = QueueManager(os.environ["QUEUE_ADDRESS"], b"secret")
    manager.connect()
    return manager.queue()  # type: ignore[attr-defined]


if "QUEUE_ADDRESS" in os.environ:  # in a worker
    shared = queue()


@app.websocket("/ws/producer")
async def producer(websocket: WebSocket) -> None:
    await websocket.accept()
    while True:
        payload = await websocket.receive_json()
        await asyncio.to_thread(shared.put, payload)
        await websocket.send_json(payload)


@app.websocket("/ws/consumer")
async def consumer(websocket: WebSocket) -> None:
    await websocket.accept()
    while True:
        payload = await asyncio.to_thread(shared.get)
        await websocket.send_json(payload)


if __name__ == "__main__":
    QueueManager.register("queue", manager_queue)
    with QueueManager(authkey=b"secret") as manager:
        os.environ["QUEUE_ADDRESS"] = str(manager.address)
        sys.path.insert(0, os.getcwd())
        uvicorn.run("lessons.naive.multiproc_server:app", port=int(sys.argv[1]), workers=2)
