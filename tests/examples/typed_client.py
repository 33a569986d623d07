"""Send the messages on the command line, print what comes, and answer each question with yes."""

import argparse
import asyncio
import json
import sys

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed


async def main(messages: list[str], count: int) -> str | None:
    """Return after `count` messages have come. Return a reason if the server closes first."""
    async with connect("ws://127.0.0.1:8000/ws", proxy=None, close_timeout=1) as websocket:
        try:
            for message in messages:
                await websocket.send(message)
            for _ in range(count):
                text = await websocket.recv(decode=True)
                print(text, flush=True)
                reply = json.loads(text)
                if reply["type"] == "question":
                    answer = {"id": reply["id"], "type": "user.answer", "yes": True}
                    await websocket.send(json.dumps(answer))
        except ConnectionClosed:
            return f"closed with {websocket.close_code}"
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Send messages, and print what comes.")
    parser.add_argument("--count", type=int, default=1, help="exit after so many messages")
    parser.add_argument("messages", nargs="+", metavar="MESSAGE")
    args = parser.parse_args()
    sys.exit(asyncio.run(main(args.messages, args.count)))
