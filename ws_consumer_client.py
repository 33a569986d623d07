# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17.0"]
# ///
"""Print the payloads that the server sends, one per line: python ws_consumer_client.py | jq .value

Payloads go to standard output, and everything else to standard error. If the server goes away,
this client waits for it, unless the server has closed the connection normally (with 1000). If
this client ends, payloads on their way to it are lost, unless the server takes acknowledgements
(--ack).
"""

import argparse
import asyncio
import os
import random
import sys
from urllib.parse import urlsplit

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

MAX_PAUSE = 8  # seconds between a connection that was closed and the next
LOCAL = ("localhost", "127.0.0.1", "::1")
# Close codes (RFC 6455)
NORMAL_CLOSURE = 1000  # the server has no more payloads
POLICY_VIOLATION = 1008  # the server refuses us


def give_up(error: Exception) -> Exception:
    """Tell connect() to raise the error."""
    return error


def keep_trying(error: Exception) -> Exception | None:
    """Tell connect() to try again, unless the server refused the connection."""
    refused = isinstance(error, InvalidStatus) and error.response.status_code < 500
    return error if refused else None


def pause(failures: int) -> float:
    """Return how long to wait before the next connection, in seconds.

    The pause is random, so that clients do not all come back at once. It grows with each failure.
    """
    return random.uniform(0, min(2**failures, MAX_PAUSE))


async def consume(url: str, token: str | None, count: int, ack: bool) -> str | None:
    """Print `count` payloads, or all if it is 0. Return a reason if the server refuses us."""
    connecting = connect(
        url,
        # HTTP_PROXY is for other machines: a proxy would look for 127.0.0.1 on its own machine.
        proxy=None if urlsplit(url).hostname in LOCAL else True,
        additional_headers={"Authorization": f"Bearer {token}"} if token else None,
        process_exception=give_up,
        close_timeout=1,
        # A pong waits behind the payloads that the server has sent ahead. A busy consumer that
        # closed the connection because of a late pong would lose all of these payloads.
        ping_timeout=None,
    )
    printed = 0
    failures = 0
    async for websocket in connecting:
        # The server exists. If it goes away from now on, wait for it.
        connecting.process_exception = keep_trying
        print("Waiting for payloads. To exit, press Ctrl+C.", file=sys.stderr, flush=True)
        try:
            async for payload in websocket:
                # JSON may contain line breaks as white space.
                print(str(payload).replace("\n", " ").replace("\r", " "), flush=True)
                printed += 1
                failures = 0
                if ack:
                    await websocket.send("ack")
                if printed == count:
                    return None
        except ConnectionClosed:
            pass
        finally:
            await websocket.close()
        if websocket.close_code == NORMAL_CLOSURE:
            return None
        reason = websocket.close_reason or "the server went away"
        closed = f"closed with {websocket.close_code}: {reason}"
        if websocket.close_code == POLICY_VIOLATION:
            return closed
        print(f"{closed}; connecting again", file=sys.stderr, flush=True)
        failures += 1
        await asyncio.sleep(pause(failures))
    return None


def main() -> int | str | None:
    """Return what sys.exit() takes: an exit code, or a line for standard error."""
    parser = argparse.ArgumentParser(description="Print the payloads that the server sends.")
    parser.add_argument("--url", default="ws://127.0.0.1:8000/ws/consumer")
    parser.add_argument("--count", type=int, default=0, metavar="N", help="exit after N payloads")
    parser.add_argument("--ack", action="store_true", help="acknowledge each payload (lessons)")
    parser.add_argument("--token", help="show who you are (lessons/auth_server.py)")
    args = parser.parse_args()
    try:
        return asyncio.run(consume(args.url, args.token, args.count, args.ack))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has left, as in `| head -1`. Python would try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return None
    except ConnectionRefusedError:
        return f"{args.url}: connection refused. Start the server first: python server.py"
    except InvalidStatus as error:
        body = " ".join(error.response.body[:200].decode(errors="replace").split())
        return f"{args.url}: {error} {body}".rstrip()
    except (OSError, ValueError, WebSocketException) as error:
        return f"{args.url}: {error}"


if __name__ == "__main__":
    sys.exit(main())
