"""The gateway as tutorials write it: a loop for each way, and asyncio.gather() for both."""

import asyncio
import os

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

UPSTREAM = os.environ.get("UPSTREAM", "ws://127.0.0.1:8001")
app = FastAPI()


@app.websocket("/ws/{path:path}")
async def forward(websocket: WebSocket, path: str) -> None:
    """Forward messages between the client and the upstream."""
    await websocket.accept()
    async with connect(f"{UPSTREAM}/ws/{path}") as upstream:

        async def to_client() -> None:
            try:
                while True:
                    await websocket.send_text(str(await upstream.recv()))
            except ConnectionClosed:
                pass

        async def to_upstream() -> None:
            try:
                while True:
                    await upstream.send(await websocket.receive_text())
            except WebSocketDisconnect:
                pass

        await asyncio.gather(to_client(), to_upstream())
