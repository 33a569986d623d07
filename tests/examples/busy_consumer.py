"""A consumer that takes five milliseconds for each payload, as steps/README.md shows it."""

import asyncio
import sys

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

SENT = int(sys.argv[1])  # payloads that the producer sends
URL = "ws://127.0.0.1:8000/ws/consumer"


async def main() -> None:
    received = 0
    # Both are 20 seconds if you do not set them.
    async with connect(URL, ping_interval=0.5, ping_timeout=0.5) as websocket:
        try:
            while received < SENT:
                await websocket.recv()
                received += 1
                await asyncio.sleep(0.005)  # the work
        except ConnectionClosed as closed:
            print(closed)
    print(f"not received:\n{SENT - received} payloads")


asyncio.run(main())
