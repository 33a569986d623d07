"""A subscriber as tutorials write it: it subscribes once, and ends when the connection breaks.

Run `python lessons/naive/pubsub_client.py`.
"""

import asyncio
import json

from websockets.asyncio.client import connect


async def main() -> None:
    async with connect("ws://127.0.0.1:8000/ws", proxy=None) as websocket:
        await websocket.send(json.dumps({"type": "subscribe", "topic": "news"}))
        async for message in websocket:
            print(message, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
