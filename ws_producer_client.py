# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17.0"]
# ///
"""Send payloads, one a second or the lines of standard input. The server echoes each as its receipt.

    python ws_producer_client.py
    cat events.jsonl | python ws_producer_client.py -

When the server goes away, this waits for it, and sends again what has no receipt, and nothing that has.
"""

import argparse
import asyncio
import itertools
import json
import os
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

AHEAD = 500  # payloads on their way at most, without a receipt
MAX_LINE = 1024 * 1024 + 2  # bytes of the largest payload and its line end; of a longer line, the start
PAUSE = 1  # seconds between a connection that was closed and the next
LOCAL = "localhost", "127.0.0.1", "::1"
REFUSED = 1007, 1008, 1009  # close codes that trying again won't change (RFC 6455, section 7.4.1)
outbox: asyncio.Queue[tuple[int, str]] = asyncio.Queue()  # line numbers and payloads
unechoed: deque[tuple[int, str]] = deque()  # those that were sent and have no receipt yet
room = threading.Semaphore(AHEAD)  # a payload holds a place until its receipt comes


def ticks(interval: float, count: int) -> Iterator[bytes]:
    for value in range(1, count + 1) if count else itertools.count(1):
        yield json.dumps({"timestamp": time.time(), "value": value}).encode()
        time.sleep(0 if value == count else interval)


def standard_input() -> Iterator[bytes]:
    with os.fdopen(0, "rb", closefd=False) as file:  # not sys.stdin: Python wants its lock when it exits
        while line := file.readline(MAX_LINE):
            yield line


def read(lines: Iterator[bytes], loop: asyncio.AbstractEventLoop, end: asyncio.Future[str | None]) -> None:
    """Put payloads in the outbox. Set `end`, once all have receipts, to what is wrong with the next line."""
    number, problem = 0, None
    with suppress(RuntimeError):  # the loop has ended
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    payload = line.decode().rstrip("\r\n")
                    room.acquire()
                    loop.call_soon_threadsafe(outbox.put_nowait, (number, payload))
        except (OSError, ValueError) as error:  # ValueError: not UTF-8
            problem = f"line {number}: {error}"
        for _ in range(AHEAD):  # all room is free when every payload has its receipt
            room.acquire()
        loop.call_soon_threadsafe(end.set_result, problem)


async def send(websocket: ClientConnection, verbose: bool) -> None:
    with suppress(ConnectionClosed):
        for _, payload in list(unechoed):
            await websocket.send(payload)
        while True:
            number, payload = await outbox.get()
            unechoed.append((number, payload))
            if verbose:
                with suppress(BrokenPipeError):  # receive() will meet it too, and can tell main()
                    print("sent   ", payload, flush=True)
            await websocket.send(payload)


async def receive(url: str, token: str | None, verbose: bool) -> str | None:
    """Take receipts, connecting again as needed. Returns the reason when the server refuses a payload."""
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
        additional_headers=headers,
        process_exception=retry,
        close_timeout=1,
    ):
        connected = True
        sender = asyncio.create_task(send(websocket, verbose))
        try:
            async for receipt in websocket:
                unechoed.popleft()
                room.release()
                if verbose:
                    print("receipt", receipt, flush=True)
        except ConnectionClosed:
            pass
        finally:
            sender.cancel()
            await websocket.close()
        closed = f"closed with {websocket.close_code}: {websocket.close_reason or 'the server went away'}"
        if websocket.close_code in REFUSED:
            return f"line {unechoed[0][0]}: {closed}" if unechoed else closed
        print(f"{closed}; connecting again", file=sys.stderr, flush=True)
        await asyncio.sleep(PAUSE)
    return None


async def produce(url: str, token: str | None, lines: Iterator[bytes], verbose: bool) -> str | None:
    loop = asyncio.get_running_loop()
    end: asyncio.Future[str | None] = loop.create_future()
    # A daemon: the thread of an asyncio.to_thread() would hold up Ctrl+C until the next line comes.
    threading.Thread(target=read, args=(lines, loop, end), daemon=True).start()
    receiver = asyncio.create_task(receive(url, token, verbose))
    done, _ = await asyncio.wait([end, receiver], return_when=asyncio.FIRST_COMPLETED)
    return done.pop().result()


def main() -> int | str | None:
    parser = argparse.ArgumentParser(description="Send payloads, and get each back as a receipt.")
    parser.add_argument("stdin", nargs="?", choices=["-"], help="send the lines of standard input")
    parser.add_argument("--url", default="ws://127.0.0.1:8000/ws/producer")
    parser.add_argument("--interval", type=float, default=1, metavar="SECONDS", help="between two payloads")
    parser.add_argument("--count", type=int, default=0, metavar="N", help="end after N payloads")
    parser.add_argument("--token", help="show who you are (for lessons/auth_server.py)")
    args = parser.parse_args()
    lines = standard_input() if args.stdin else ticks(args.interval, args.count)
    try:
        return asyncio.run(produce(args.url, args.token, lines, verbose=not args.stdin))
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
