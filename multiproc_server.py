# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Forward one websocket to another with many workers, which share one queue.

Run `python multiproc_server.py` (--host, --port, --workers) and the clients as with server.py: a
payload goes from any worker to any other. The queue is in a process of its own, a manager of
`multiprocessing`. Delivery is at most once, as with server.py. A worker that is killed loses at
most BATCH payloads, one for each of its consumers, and what slow consumers have not received.
"""

import signal

if __name__ == "__main__":
    # Ctrl+C during the imports below ends the program at once, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import functools
import heapq
import itertools
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.managers import BaseManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect, WebSocketException
from fastapi.responses import FileResponse, PlainTextResponse, Response
from pydantic_core import from_json
from starlette.types import Message
from uvicorn.supervisors import Multiprocess

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

CAPACITY = 1000  # payloads
TIMEOUT = 1  # seconds to wait for space in the queue, and for a close frame to be sent
RETRY = 0.04  # seconds between two attempts to queue payloads
WAIT = 0.3  # seconds that one call waits for a payload
MAX_PAYLOAD = 1024 * 1024  # bytes of UTF-8
BURST = 32  # payloads that a consumer takes in a row before the others get a turn
BATCH = 256  # payloads that one call carries to the shared queue or from it
GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left
log = logging.getLogger("uvicorn.error")  # uvicorn prints what this logger gets

if __name__ not in ("__main__", "__mp_main__"):  # multiprocessing imports it as __mp_main__
    log.error("there is no queue: run python multiproc_server.py, which starts it and the workers")
    sys.exit(3)  # tells uvicorn not to start the worker again


class SharedQueue:
    """The queue, in the manager's process. Each calling thread has a thread of its own there."""

    def __init__(self) -> None:
        # The lowest number comes out first, so a payload that goes back is the next one out.
        self.entries: list[tuple[int, str]] = []
        self.numbers = itertools.count()
        self.changed = threading.Condition()
        self.left: set[int] = set()

    def qsize(self) -> int:
        return len(self.entries)

    def put(self, payloads: list[str]) -> int:
        """Queue the first of the payloads, as many as there is space for. Return how many."""
        with self.changed:
            accepted = payloads[: max(0, CAPACITY - len(self.entries))]
            self.put_back([(next(self.numbers), payload) for payload in accepted])
            return len(accepted)

    def put_back(self, entries: list[tuple[int, str]]) -> None:
        with self.changed:
            for entry in entries:
                heapq.heappush(self.entries, entry)
            self.changed.notify_all()

    def take(self, worker: int) -> list[tuple[int, str]]:
        """Take at most BATCH payloads. Wait up to WAIT seconds for the first, or until leave()."""
        with self.changed:
            self.changed.wait_for(lambda: self.entries or worker in self.left, WAIT)
            count = 0 if worker in self.left else min(BATCH, len(self.entries))
            self.left.discard(worker)
            return [heapq.heappop(self.entries) for _ in range(count)]

    def leave(self, worker: int) -> None:
        """End the take() of a worker whose last waiting consumer has left."""
        with self.changed:
            self.left.add(worker)
            self.changed.notify_all()


@functools.cache
def shared_queue() -> SharedQueue:
    return SharedQueue()


class QueueManager(BaseManager):
    """Serve the queue on a Unix socket, to processes that have inherited this run's random key."""


QueueManager.register("queue", shared_queue)


class Channel:
    """A worker's end of the shared queue. The consumers of the worker take turns."""

    shared: Any  # a proxy: its methods run in the manager's process

    def __init__(self) -> None:
        # A call blocks its thread. One call may wait for payloads, the others do not wait.
        self.threads = ThreadPoolExecutor(2)
        # Payloads that this worker has taken, and how many of its consumers wait for one.
        self.queue: asyncio.PriorityQueue[tuple[int, str]] = asyncio.PriorityQueue()
        self.waiting = 0
        self.wake = asyncio.Event()
        self.stopping = False
        self.line = asyncio.Lock()

    async def call(self, method: Callable[..., Any], *args: object) -> Any:
        """Call a method of the shared queue, without blocking the event loop."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, method, *args)
        except (EOFError, OSError):
            raise WebSocketException(1012, "the process that holds the queue is gone") from None

    async def qsize(self) -> int:
        """Count the payloads in the shared queue."""
        count: int = await self.call(self.shared.qsize)
        return count

    async def put(self, payloads: list[str], max_wait: float) -> int:
        """Queue the first of the payloads, at least one. Return how many, or raise TimeoutError."""
        deadline = time.monotonic() + max_wait
        # Producers wait in line. Otherwise one could get all the space while another gets none.
        async with asyncio.timeout(max_wait):
            await self.line.acquire()
        try:
            # A call that is on its way must not be cancelled: it may queue the payloads.
            count: int = await self.call(self.shared.put, payloads)
            while not count and time.monotonic() < deadline:
                await asyncio.sleep(RETRY)
                count = await self.call(self.shared.put, payloads)
        finally:
            self.line.release()
        if not count:
            raise TimeoutError
        return count

    async def deliver(self, handle: Callable[[str], Awaitable[object]]) -> None:
        """Call `handle` with each payload. If it fails or is cancelled, the payload goes back."""
        for taken in itertools.count(1):
            waited = self.queue.empty()
            self.waiting += 1
            self.wake.set()
            try:
                number, payload = await self.queue.get()
            except asyncio.CancelledError:
                if self.waiting == 1:
                    self.threads.submit(self.shared.leave, os.getpid())
                raise
            finally:
                self.waiting -= 1
            try:
                await handle(payload)
            except BaseException:
                self.queue.put_nowait((number, payload))
                self.wake.set()
                raise
            # While there are payloads, nothing above pauses: let the other consumers run.
            if waited or taken % BURST == 0:
                await asyncio.sleep(0)

    async def fetch(self) -> None:
        """Take payloads for the consumers that wait, and give back what no consumer takes."""
        while not self.stopping:
            if self.waiting and self.queue.empty():
                for entry in await self.call(self.shared.take, os.getpid()):
                    self.queue.put_nowait(entry)
            else:
                self.wake.clear()
                await self.wake.wait()
            # In each turn of the event loop, every consumer that can take a payload takes some.
            before = 0
            while self.queue.qsize() != before:
                before = self.queue.qsize()
                await asyncio.sleep(0)
            left = [self.queue.get_nowait() for _ in range(before)]
            if left:
                await self.call(self.shared.put_back, left)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # A parent that is killed cannot stop its workers, so each worker watches it.
    parent = multiprocessing.parent_process()
    if parent:
        loop = asyncio.get_running_loop()
        loop.add_reader(parent.sentinel, os.kill, os.getpid(), signal.SIGTERM)
    manager = QueueManager(os.environ["QUEUE_ADDRESS"])
    manager.connect()
    channel.shared = manager.queue()  # type: ignore[attr-defined]
    fetcher = asyncio.create_task(channel.fetch())
    yield  # until every endpoint has returned
    channel.stopping = True
    channel.wake.set()
    with suppress(WebSocketException):
        await fetcher


app = FastAPI(lifespan=lifespan)
channel = Channel()


async def same_origin(websocket: WebSocket) -> None:
    """Refuse web pages from other sites. Browsers send an Origin header, scripts do not."""
    origin = websocket.headers.get("origin")
    host = websocket.headers.get("host")
    if origin not in (None, f"http://{host}", f"https://{host}"):
        reason = f"a page from {origin} may not connect to {host}: open the page at that address"
        raise WebSocketException(1008, reason)


@app.exception_handler(WebSocketException)
async def close(websocket: WebSocket, error: WebSocketException) -> None:
    """Close the connection with the code and the reason of the exception, and log them."""
    host, port = websocket.client or ("unknown", 0)
    log.warning("%s:%d closed with %d: %s", host, port, error.code, error.reason)
    with suppress(*GONE, TimeoutError, asyncio.CancelledError):
        async with asyncio.timeout(TIMEOUT):
            await websocket.close(error.code, error.reason)


def validate(payload: str | None) -> str:
    """Return the payload if it is JSON of at most MAX_PAYLOAD bytes. None is a binary frame."""
    if payload is None:
        raise WebSocketException(1003, "a binary frame: send payloads as text")
    if len(payload.encode()) > MAX_PAYLOAD:
        raise WebSocketException(1009, f"a payload has at most {MAX_PAYLOAD} bytes")
    try:
        from_json(payload, allow_inf_nan=False)
    except ValueError as error:
        raise WebSocketException(1007, f"not JSON: {error}") from None
    return payload


async def receive_batch(websocket: WebSocket) -> list[Message]:
    """Wait for a message, and return it with the messages that have already arrived after it."""
    messages = [await websocket.receive()]
    # A timeout of 0 ends the first receive() that would have to wait.
    with suppress(TimeoutError):
        async with asyncio.timeout(0):
            while messages[-1]["type"] != "websocket.disconnect" and len(messages) < BATCH:
                messages.append(await websocket.receive())
    return messages


async def put_batch(websocket: WebSocket, payloads: list[str]) -> None:
    """Queue the payloads, and send each back as its receipt."""
    while payloads:
        try:
            count = await channel.put(payloads, TIMEOUT)
        except TimeoutError:
            raise WebSocketException(1013, "the queue is full: try again later") from None
        for payload in payloads[:count]:
            # The receipt. The payload is queued, even if the producer has left meanwhile.
            with suppress(*GONE):
                await websocket.send_text(payload)
        del payloads[:count]


@app.websocket("/ws/producer", dependencies=[Depends(same_origin)])
async def producer(websocket: WebSocket) -> None:
    await websocket.accept()
    # If the producer does not read its receipts, uvicorn cancels this endpoint when it stops.
    with suppress(asyncio.CancelledError):
        while True:
            payloads: list[str] = []
            try:
                for message in await receive_batch(websocket):
                    if message["type"] == "websocket.disconnect":
                        return
                    payloads.append(validate(message.get("text")))
            finally:
                # A payload that is refused does not harm the payloads before it.
                await put_batch(websocket, payloads)


async def send_payloads(websocket: WebSocket) -> None:
    """Send payloads until the consumer leaves. One that cannot be sent goes back to the front."""
    with suppress(*GONE):
        await channel.deliver(websocket.send_text)


@app.websocket("/ws/consumer", dependencies=[Depends(same_origin)])
async def consumer(websocket: WebSocket) -> None:
    await websocket.accept()
    # If the consumer does not read its payloads, uvicorn cancels this endpoint when it stops.
    with suppress(asyncio.CancelledError):
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(send_payloads(websocket))
            # Only receive() tells us that the consumer has left, or that uvicorn is stopping.
            while (await websocket.receive())["type"] != "websocket.disconnect":
                pass
            sender.cancel()


@app.get("/stats")
async def stats() -> dict[str, int | bool]:
    return {"queued": await channel.qsize(), "capacity": CAPACITY, "acks": False}


@app.get("/")
async def index() -> Response:
    page = Path(__file__).parent / "web/index.html"
    if page.exists():
        return FileResponse(page, headers={"Content-Security-Policy": "frame-ancestors 'none'"})
    return PlainTextResponse("A queue: send to /ws/producer, receive from /ws/consumer.")


def start_manager() -> None:
    """Run in the manager's process. Make sure that it ends if the parent is killed."""
    threading.Thread(target=end_after_parent, daemon=True).start()


def end_after_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def stop_after(manager_process: BaseProcess) -> None:
    """Run in a thread of the parent. Stop the server if the manager's process dies."""
    # The main thread blocks SIGINT, so Ctrl+C reaches this thread. Python runs the handler in the
    # main thread all the same.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    manager_process.join()
    if manager_process.exitcode:
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(description="Forward one websocket to another.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--ws", default="auto", metavar="MODULE:CLASS", help="protocol class")
    parser.add_argument("--ws-max-size", type=int, default=16 * MAX_PAYLOAD, metavar="BYTES")
    args = parser.parse_args()
    # Without this, a client with large cookies gets no answer, and makes Ctrl+C crash.
    os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", "1000000")
    # A new process inherits the blocked signals. Ctrl+C and systemd signal every process of the
    # group, but the manager must outlive the workers. The resource tracker must start first,
    # because its start unblocks both signals.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    # "spawn" works on every system. "fork" is unsafe on macOS, and the server of "forkserver" dies
    # if systemd sends SIGTERM to the whole group.
    manager = QueueManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(start_manager)
    # SIGINT stays blocked, because Ctrl+C during a worker's imports would print a traceback.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.environ["QUEUE_ADDRESS"] = str(manager.address)
    [process] = multiprocessing.active_children()
    threading.Thread(target=stop_after, args=[process], daemon=True).start()
    # Compression would cost twice the CPU or more, for clients that offer it, as browsers do.
    options = {"timeout_graceful_shutdown": 1, "ws_per_message_deflate": False, **vars(args)}
    config = uvicorn.Config("__main__:app", **options)
    with manager, config.bind_socket() as listener:
        # asyncio does not set it on a socket that it did not make (Kludex/uvicorn#3149).
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Without this line, uvicorn opens stdin again in each worker, and never closes it.
        sys.stdin = None
        # A worker that is killed while it starts breaks the pipe to it. All workers end with us.
        with suppress(BrokenPipeError):
            Multiprocess(config, [listener]).run()
        if process.exitcode is not None:
            sys.exit("the process that held the queue died, so the queue is lost")
        queue = manager.queue()  # type: ignore[attr-defined]
        log.info("%d payloads were still queued", queue.qsize())


if __name__ == "__main__":
    main()
