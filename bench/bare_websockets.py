"""The plainest relay on the bare websockets library, to compare with: no check, no limit, no care at the end.

Run `python bench/bare_websockets.py 8000`. At most once: a consumer that leaves takes a payload with it.
"""

import asyncio
import sys

from websockets.asyncio.server import ServerConnection, serve

queue: asyncio.Queue[str | bytes] = asyncio.Queue(1000)


async def handler(websocket: ServerConnection) -> None:
    if websocket.request and websocket.request.path == "/ws/producer":
        async for payload in websocket:
            await queue.put(payload)
            await websocket.send(payload)
    else:
        while True:
            await websocket.send(await queue.get())


async def main() -> None:
    async with serve(handler, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
