# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17.0"]
# ///
"""Send one payload per second, or the lines of standard input. Each comes back as its receipt.

    python ws_producer_client.py
    cat events.jsonl | python ws_producer_client.py -

If the server goes away, this client waits for it, and resends only what has no receipt.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

AHEAD = 500  # payloads that may be on their way without a receipt
MAX_LINE = 1024 * 1024 + 2  # bytes: the largest payload and its line end
MAX_PAUSE = 8  # seconds between a connection that was closed and the next
LOCAL = ("localhost", "127.0.0.1", "::1")
REFUSED = (1007, 1008, 1009)  # close codes after which trying again does not help (RFC 6455)

Line = tuple[int, str]  # a line's number and its payload
outbox: asyncio.Queue[Line | None] = asyncio.Queue()  # None is the end
unechoed: deque[Line] = deque()  # sent, but without a receipt yet
space = threading.Semaphore(AHEAD)  # taken by a payload until its receipt comes
ended = asyncio.Event()  # there are no more payloads to send


async def send(websocket: ClientConnection, verbose: bool) -> None:
    """Send what has no receipt yet, then what is in the outbox, without waiting for receipts."""
    with suppress(ConnectionClosed):
        for _, payload in list(unechoed):
            await websocket.send(payload)
        while not ended.is_set():
            line = await outbox.get()
            if line is None:
                ended.set()
                break
            unechoed.append(line)
            _, payload = line
            if verbose:
                # receive() gets the same error when it prints, and it passes the error to main().
                with suppress(OSError):
                    print("sent   ", payload, flush=True)
            await websocket.send(payload)
        if not unechoed:
            await websocket.close()


async def receive(websocket: ClientConnection, verbose: bool) -> int:
    """Take receipts, which come in the order of the payloads. Return how many have come."""
    receipts = 0
    with suppress(ConnectionClosed):
        async for receipt in websocket:
            if not unechoed:
                raise ValueError("a receipt came for nothing: is this the address of a producer?")
            receipts += 1
            unechoed.popleft()
            space.release()
            if verbose:
                print("receipt", receipt, flush=True)
            if ended.is_set() and not unechoed:
                break
    return receipts


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


async def produce(url: str, token: str | None, verbose: bool) -> str | None:
    """Send all payloads, on as many connections as it takes. Return a reason if one is refused."""
    connecting = connect(
        url,
        # HTTP_PROXY is for other machines: a proxy would look for 127.0.0.1 on its own machine.
        proxy=None if urlsplit(url).hostname in LOCAL else True,
        additional_headers={"Authorization": f"Bearer {token}"} if token else None,
        process_exception=give_up,
        close_timeout=1,
        # While the queue is full, the server does not read, so the answer to a ping comes late.
        ping_timeout=None,
    )
    failures = 0
    async for websocket in connecting:
        # The server exists. If it goes away from now on, wait for it.
        connecting.process_exception = keep_trying
        sender = asyncio.create_task(send(websocket, verbose))
        try:
            receipts = await receive(websocket, verbose)
        finally:
            sender.cancel()
            await websocket.close()
        if ended.is_set() and not unechoed:
            return None
        reason = websocket.close_reason or "the server went away"
        closed = f"closed with {websocket.close_code}: {reason}"
        if websocket.close_code in REFUSED:
            number, _ = unechoed[0] if unechoed else (0, "")
            return f"line {number}: {closed}" if number else closed
        print(f"{closed}; connecting again", file=sys.stderr, flush=True)
        failures = 1 if receipts else failures + 1
        await asyncio.sleep(pause(failures))
    return None


# The rest reads lines without blocking Ctrl+C. Skip it on a first reading.


def ticks(interval: float, count: int) -> Iterator[bytes]:
    """Make `count` payloads, or payloads without end if it is 0, one per `interval` seconds."""
    for value in itertools.count(1):
        yield json.dumps({"timestamp": time.time(), "value": value}).encode()
        if value == count:
            return
        time.sleep(interval)


def standard_input() -> Iterator[bytes]:
    """Read lines. A line that is longer than MAX_LINE comes in parts, which the server refuses."""
    # Do not use sys.stdin: at exit, Python would wait for its lock, which this thread holds.
    with os.fdopen(0, "rb", closefd=False) as file:
        while line := file.readline(MAX_LINE):
            yield line


def read(lines: Iterator[bytes], loop: asyncio.AbstractEventLoop, problems: list[str]) -> None:
    """Put lines into the outbox, then None. Stop at a line that is not UTF-8, and say so."""
    number = 0
    # RuntimeError: the loop has ended.
    with suppress(RuntimeError):
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    payload = line.decode().rstrip("\r\n")
                    space.acquire()
                    loop.call_soon_threadsafe(outbox.put_nowait, (number, payload))
        except (OSError, ValueError, OverflowError) as error:
            problems.append(f"line {number}: {error}")
        loop.call_soon_threadsafe(outbox.put_nowait, None)


async def run(url: str, token: str | None, lines: Iterator[bytes], verbose: bool) -> str | None:
    """Produce the lines. Return what went wrong, if anything."""
    problems: list[str] = []
    # asyncio cannot wait for every kind of file on every system, so a thread reads the lines. It is
    # a daemon, because the thread of asyncio.to_thread() would delay Ctrl+C until the next line.
    reading = (lines, asyncio.get_running_loop(), problems)
    threading.Thread(target=read, args=reading, daemon=True).start()
    refused = await produce(url, token, verbose)
    return refused or next(iter(problems), None)


def main() -> int | str | None:
    """Return what sys.exit() takes: an exit code, or a line for standard error."""
    parser = argparse.ArgumentParser(description="Send payloads, and get each back as a receipt.")
    parser.add_argument("stdin", nargs="?", choices=["-"], help="send lines of standard input")
    parser.add_argument("--url", default="ws://127.0.0.1:8000/ws/producer")
    parser.add_argument("--interval", type=float, default=1, metavar="SECONDS")
    parser.add_argument("--count", type=int, default=0, metavar="N", help="exit after N payloads")
    parser.add_argument("--token", help="show who you are (lessons/auth_server.py)")
    args = parser.parse_args()
    lines = standard_input() if args.stdin else ticks(args.interval, args.count)
    try:
        return asyncio.run(run(args.url, args.token, lines, verbose=not args.stdin))
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
