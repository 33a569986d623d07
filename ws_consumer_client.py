# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17.0"]
# ///
"""Print the payloads that the server sends, one a line: python ws_consumer_client.py | jq .value

Payloads go to standard output, everything else to standard error. When the server goes away, this waits for
it. What is on its way to a consumer that ends is lost, unless the server takes acknowledgements (--ack).
"""

import argparse
import asyncio
import os
import sys
from urllib.parse import urlsplit

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

PAUSE = 1  # seconds between a connection that was closed and the next
LOCAL = "localhost", "127.0.0.1", "::1"


async def consume(url: str, token: str | None, count: int, ack: bool) -> str | None:
    """Print `count` payloads (0: without end). Returns the reason where the server wants us no more."""
    connected = False

    def retry(error: Exception) -> Exception | None:
        """Answer None, try again, where the server was there before and may come back."""
        refused = isinstance(error, InvalidStatus) and error.response.status_code < 500
        return None if connected and not refused else error

    headers = {"Authorization": f"Bearer {token}"} if token else None
    async for websocket in connect(
        url,
        # HTTP_PROXY is for other machines: a proxy would look for 127.0.0.1 on its own machine.
        proxy=None if urlsplit(url).hostname in LOCAL else True,
        # A pong waits behind the payloads that the server has written ahead. If a busy consumer closed
        # because a pong is late, it would lose all payloads that it has not read yet, without --ack.
        ping_timeout=None,
        additional_headers=headers,
        process_exception=retry,
        close_timeout=1,
    ):
        connected = True
        try:
            async for payload in websocket:
                print(str(payload).replace("\n", " ").replace("\r", " "), flush=True)
                if ack:
                    await websocket.send("ack")
                count -= 1
                if count == 0:
                    return None
        except ConnectionClosed:
            pass
        finally:
            await websocket.close()
        closed = f"closed with {websocket.close_code}: {websocket.close_reason or 'the server went away'}"
        if websocket.close_code == 1008:  # policy violation: the next connection would end like this one
            return closed
        print(f"{closed}; connecting again", file=sys.stderr, flush=True)
        await asyncio.sleep(PAUSE)
    return None


def main() -> int | str | None:
    parser = argparse.ArgumentParser(description="Print the payloads that the server sends, one a line.")
    parser.add_argument("--url", default="ws://127.0.0.1:8000/ws/consumer")
    parser.add_argument("--count", type=int, default=0, metavar="N", help="end after N payloads")
    parser.add_argument("--ack", action="store_true", help="acknowledge each payload (for the lessons)")
    parser.add_argument("--token", help="show who you are (for lessons/auth_server.py)")
    args = parser.parse_args()
    try:
        return asyncio.run(consume(args.url, args.token, args.count, args.ack))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has left, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return None
    except InvalidStatus as error:
        why = " ".join(error.response.body[:200].decode(errors="replace").split())
        return f"{args.url}: {error} {why}".rstrip()
    except (OSError, ValueError, WebSocketException) as error:  # a ValueError is a bad port
        return f"{args.url}: {error}"


if __name__ == "__main__":
    sys.exit(main())
