"""Follow a stream of lessons/log_server.py, as lessons/log_server.md shows it.

Run `python tests/examples/follow.py STREAM`. The offset is in the file `STREAM.offset`.
"""

import asyncio
import json
import random
import sys
from contextlib import suppress
from pathlib import Path

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed


def load(file: Path) -> str:
    """Return where to go on. At first, that is with all events that the server has kept."""
    return file.read_text() if file.exists() else "0"


def save(file: Path, after: str) -> None:
    file.write_text(after)


async def read(websocket: ClientConnection, file: Path) -> str:
    """Print each event, and keep its offset in the file. Return how the stream ended."""
    start = json.loads(await websocket.recv())
    if not start["recovered"]:
        print("some events are gone", file=sys.stderr)
    while True:
        event = json.loads(await websocket.recv())
        if "end" in event:
            return str(event["end"])
        if "missed" in event:
            print(f"{event['missed']} events are gone", file=sys.stderr)
        else:
            print(json.dumps(event["payload"]), flush=True)
            # After the work. If this program dies before this line, it gets the event again.
            save(file, f"{start['epoch']}:{event['offset']}")


async def follow(url: str, file: Path) -> str:
    """Follow a stream until it ends. If the connection breaks, go on after the last event."""
    while True:
        # If there is no server, this tries again, after a random time that grows.
        async for websocket in connect(f"{url}?after={load(file)}", proxy=None):
            with suppress(ConnectionClosed):
                return await read(websocket, file)
            break
        await asyncio.sleep(random.uniform(0, 1))


if __name__ == "__main__":
    stream = sys.argv[1]
    url = f"ws://127.0.0.1:8000/ws/{stream}/consumer"
    with suppress(KeyboardInterrupt):
        print(asyncio.run(follow(url, Path(f"{stream}.offset"))), file=sys.stderr)
