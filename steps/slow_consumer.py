"""A consumer that is too slow. It reads nothing until its standard input ends.

Then it closes its connection, and prints what the server had already sent to it.
"""

import asyncio
import sys

from websockets.asyncio.client import connect

URL = "ws://127.0.0.1:8000/ws/consumer"


async def main() -> None:
    # One payload may wait in this process. A few megabytes wait in the operating system.
    async with connect(URL, max_queue=1, compression=None, proxy=None) as websocket:
        await asyncio.to_thread(sys.stdin.read)
        closing = asyncio.create_task(websocket.close())
        async for payload in websocket:
            print(payload)
        await closing


asyncio.run(main())
