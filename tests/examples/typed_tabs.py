"""Keep websockets open, as the tabs of browsers do, and see whether the HTTP API still answers."""

import asyncio
import sys
from contextlib import AsyncExitStack

from websockets.asyncio.client import connect


async def get(path: str) -> str:
    """Send an HTTP request. Return the status line."""
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    status = (await reader.readline()).decode().strip()
    writer.close()
    return status


async def main(tabs: int) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(tabs):
            connecting = connect(f"ws://127.0.0.1:{PORT}/ws", proxy=None)
            websocket = await stack.enter_async_context(connecting)
            await websocket.send("?")
            await websocket.recv()
        print(f"{tabs} websockets are open. GET /number: {await get('/number')}")


if __name__ == "__main__":
    PORT = int(sys.argv[2]) if sys.argv[2:] else 8000
    asyncio.run(main(int(sys.argv[1])))
