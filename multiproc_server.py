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
import secrets
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.managers import BaseManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, WebSocket, WebSocketDisconnect
from fastapi.exceptions import WebSocketException
from fastapi.responses import FileResponse, PlainTextResponse, Response
from pydantic_core import from_json
from starlette.types import Message
from uvicorn.config import STARTUP_FAILURE
from uvicorn.importer import ImportFromStringError, import_from_string
from uvicorn.supervisors import Multiprocess, multiprocess

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

CAPACITY = 1000  # payloads
TIMEOUT = 1  # seconds to wait for space in the queue, and for a close frame to be sent
RETRY = 0.04  # seconds between two attempts to queue payloads
MAX_PAYLOAD = 1024 * 1024  # bytes of UTF-8
BURST = 32  # payloads that a consumer takes in one turn, at most
BATCH = 64  # payloads that one call carries to the shared queue or from it
GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left
LOST = (EOFError, OSError)  # raised by calling a manager that has died
STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
log = logging.getLogger("uvicorn.error")  # uvicorn prints what this logger gets

if __name__ not in ("__main__", "__mp_main__"):  # multiprocessing imports it as __mp_main__
    log.error("there is no queue: run python multiproc_server.py, which starts it and the workers")
    sys.exit(3)  # tells uvicorn not to start the worker again


class SharedQueue:
    """The queue, in the manager's process. Its methods answer at once: none waits for a payload."""

    def __init__(self) -> None:
        # The manager has a thread for each worker.
        self.lock = threading.RLock()
        # The lowest number comes out first, so a payload that goes back is the next one out.
        self.entries: list[tuple[int, str]] = []
        self.numbers = itertools.count()
        # The addresses of the workers that want to know when there are more payloads.
        self.waiting: set[str] = set()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def qsize(self) -> int:
        return len(self.entries)

    def put(self, payloads: list[str]) -> int:
        """Queue the first of the payloads, as many as there is space for. Return how many."""
        with self.lock:
            accepted = payloads[: max(0, CAPACITY - len(self.entries))]
            self.put_back([(next(self.numbers), payload) for payload in accepted])
            return len(accepted)

    def put_back(self, entries: list[tuple[int, str]]) -> None:
        with self.lock:
            for entry in entries:
                heapq.heappush(self.entries, entry)
            for worker in self.waiting:
                # A worker that has ended has no socket any more.
                with suppress(OSError):
                    self.socket.sendto(b"wake up", worker)
            self.waiting.clear()

    def take(self, worker: str, most: int) -> list[tuple[int, str]]:
        """Take at most `most` payloads. If there are fewer, wake up the worker when more arrive."""
        with self.lock:
            count = min(most, len(self.entries))
            if count < most:
                self.waiting.add(worker)
            return [heapq.heappop(self.entries) for _ in range(count)]


@functools.cache
def shared_queue() -> SharedQueue:
    return SharedQueue()


class QueueManager(BaseManager):
    """Serve the queue on a Unix socket, to processes that have inherited this run's random key."""


QueueManager.register("queue", shared_queue)


class Channel:
    """A worker's end of the shared queue. The consumers of the worker take turns."""

    # A proxy: its methods run in the manager's process. A call blocks the event loop, but for less
    # time than it would take to hand the call over to a thread.
    shared: Any

    def __init__(self) -> None:
        # Payloads that this worker has taken, and how many of its consumers wait for one.
        self.queue: asyncio.PriorityQueue[tuple[int, str]] = asyncio.PriorityQueue()
        self.waiting = 0
        self.wanted = asyncio.Event()
        # Set if the shared queue may have payloads. If not, the manager will wake us up.
        self.filled = asyncio.Event()
        self.filled.set()
        self.line = asyncio.Lock()  # the line in which producers wait
        self.consumers = 0  # how many take turns

    def qsize(self) -> int:
        """Count the payloads in the shared queue."""
        count: int = self.shared.qsize()
        return count

    async def put(self, payloads: list[str], max_wait: float) -> int:
        """Queue the first of the payloads, at least one. Return how many, or raise TimeoutError."""
        # Producers wait in line. Otherwise one could get all the space while another gets none.
        async with asyncio.timeout(max_wait), self.line:
            count: int = self.shared.put(payloads)
            while not count:
                await asyncio.sleep(RETRY)
                count = self.shared.put(payloads)
            return count

    async def deliver(self, handle: Callable[[str], Awaitable[object]]) -> None:
        """Call `handle` with each payload. If it fails or is cancelled, the payload goes back."""
        self.consumers += 1
        remaining = 1  # payloads that this consumer takes before it lets the others run
        try:
            while True:
                # If get() has to wait, a new turn begins, with one payload.
                if self.queue.empty():
                    remaining = 1
                self.waiting += 1
                self.wanted.set()
                try:
                    number, payload = await self.queue.get()
                finally:
                    self.waiting -= 1
                    if not self.waiting:
                        self.wanted.clear()
                try:
                    await handle(payload)
                except BaseException:
                    self.queue.put_nowait((number, payload))
                    self.give_back()
                    raise
                remaining -= 1
                if remaining == 0 and not self.queue.empty():
                    # Let the others run. Nothing above pauses if all payloads can be sent at once.
                    await asyncio.sleep(0)
                    # Take only half of a fair share: the others get their shares of what is left.
                    share = self.queue.qsize() // self.consumers
                    remaining = max(1, min(BURST, share // 2))
        finally:
            self.consumers -= 1

    async def fetch(self, worker: str) -> None:
        """Take payloads for the consumers that wait, and give back what no consumer takes."""
        most = BATCH
        with suppress(*LOST):
            while True:
                await self.filled.wait()
                await self.wanted.wait()
                entries = self.shared.take(worker, most)
                if len(entries) < most:
                    self.filled.clear()
                for entry in entries:
                    self.queue.put_nowait(entry)
                # In each turn of the event loop, every consumer that can take a payload takes some.
                before = 0
                while self.queue.qsize() != before:
                    before = self.queue.qsize()
                    await asyncio.sleep(0)
                # What goes back costs time, and its space is free meanwhile: next time, take less.
                most = max(1, len(entries) - before) if before else min(BATCH, 2 * most)
                self.give_back()

    def give_back(self) -> None:
        """Return all payloads that no consumer has taken to the shared queue."""
        entries = [self.queue.get_nowait() for _ in range(self.queue.qsize())]
        if entries:
            with suppress(*LOST):
                self.shared.put_back(entries)


def watch_parent() -> None:
    """Stop this worker if its parent is killed, and the parent if this worker's terminal closes."""
    loop = asyncio.get_running_loop()
    parent = multiprocessing.parent_process()
    if parent and parent.pid:
        loop.add_reader(parent.sentinel, os.kill, os.getpid(), signal.SIGTERM)
        # When a terminal closes, every process gets a SIGHUP. For a rolling restart, `kill -HUP`
        # sends it to the parent alone. If `nohup` started the server, the workers ignore it.
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            loop.add_signal_handler(signal.SIGHUP, os.kill, parent.pid, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    watch_parent()
    address = os.environ["QUEUE_ADDRESS"]
    manager = QueueManager(address)
    manager.connect()
    channel.shared = manager.queue()  # type: ignore[attr-defined]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wake_up:

        def hear_manager() -> None:
            wake_up.recv(100)
            channel.filled.set()

        wake_up.bind(str(Path(address).with_name(secrets.token_hex(4))))
        asyncio.get_running_loop().add_reader(wake_up, hear_manager)
        fetcher = asyncio.create_task(channel.fetch(wake_up.getsockname()))
        with suppress(asyncio.CancelledError):  # raised here if Ctrl+C is pressed twice
            yield  # until every endpoint has returned
        fetcher.cancel()
        channel.give_back()


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
        except LOST:
            raise WebSocketException(1012, "the process that holds the queue is gone") from None
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
    try:
        queued = channel.qsize()
    except LOST:
        raise HTTPException(503, "the process that holds the queue is gone") from None
    return {"queued": queued, "capacity": CAPACITY, "acks": False}


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


class Worker(multiprocess.Process):
    """A worker as its parent sees it. uvicorn asks it twice a second whether it is alive."""

    def start(self) -> None:
        super().start()
        # The worker has this end of the pipe, too. With both open, uvicorn would wait half a minute
        # for the answer of a worker that has ended.
        self.child_conn.close()


def pass_on_signals(server: Multiprocess) -> None:
    """Run in a thread of the parent. uvicorn's own handlers finish a rolling restart first."""
    while (number := signal.sigwait(STOPPING)) == signal.SIGHUP:
        server.signal_queue.append(number)
    server.should_exit.set()


def stop_with(manager_process: BaseProcess, server: Multiprocess) -> None:
    """Run in a thread of the parent. Stop the server if the manager's process dies."""
    manager_process.join()
    server.should_exit.set()


def main() -> None:
    parser = argparse.ArgumentParser(description="Forward one websocket to another.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--ws", default="auto", metavar="MODULE:CLASS", help="protocol class")
    parser.add_argument("--ws-max-size", type=int, default=16 * MAX_PAYLOAD, metavar="BYTES")
    args = parser.parse_args()
    if args.workers < 1 or not 0 <= args.port <= 65535:
        parser.error("--workers must be at least 1, and --port a number from 0 to 65535")
    try:
        # In a worker, a wrong name would be an error again and again.
        args.ws = args.ws if args.ws == "auto" else import_from_string(args.ws)
    except ImportFromStringError as error:
        parser.error(f"--ws: {error}")
    # Without this, a client with large cookies gets no answer, and makes Ctrl+C crash.
    os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", "1000000")
    # A new process inherits the blocked signals. Ctrl+C, systemd and a closed terminal signal every
    # process of the group, but the manager must outlive the workers, and a worker that is stopped
    # while it imports would print a traceback. Starting the resource tracker unblocks two of them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    # "spawn" works on every system. "fork" is unsafe on macOS, and the server of "forkserver" dies
    # if systemd sends SIGTERM to the whole group.
    manager = QueueManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(start_manager)
    os.environ["QUEUE_ADDRESS"] = str(manager.address)
    [process] = multiprocessing.active_children()
    config = uvicorn.Config(
        "__main__:app",
        timeout_graceful_shutdown=1,
        # By default, uvicorn kills a worker that takes more than 5 seconds to start.
        timeout_worker_healthcheck=30,
        # Compression would cost twice the CPU or more, for clients that offer it, as browsers do.
        ws_per_message_deflate=False,
        **vars(args),
    )
    multiprocess.Process = Worker  # type: ignore[misc]
    with manager, config.bind_socket() as listener:
        # asyncio does not set it on a socket that it did not make (Kludex/uvicorn#3149).
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Without this line, uvicorn opens stdin again in each worker, and never closes it.
        sys.stdin = None
        # uvicorn sets a handler for SIGHUP. Undo that, so that the workers inherit it from `nohup`.
        on_hangup = signal.getsignal(signal.SIGHUP)
        server = Multiprocess(config, [listener])
        signal.signal(signal.SIGHUP, on_hangup)
        failure = None
        # If a signal came while the manager started, start no workers.
        if not signal.sigpending():
            threading.Thread(target=pass_on_signals, args=[server], daemon=True).start()
            threading.Thread(target=stop_with, args=[process, server], daemon=True).start()
            try:
                server.run()
            except OSError as error:  # too many open files, or the worker was killed as it started
                failure = f"a worker could not be started: {error}"
                server.terminate_all()
                server.join_all()
            if any(worker.exitcode == STARTUP_FAILURE for worker in server.processes):
                failure = "a worker failed to start"
        if process.exitcode is not None:
            sys.exit("the process that held the queue died, so the queue is lost")
        queue = manager.queue()  # type: ignore[attr-defined]
        log.info("%d payloads were still queued", queue.qsize())
        sys.exit(failure)


if __name__ == "__main__":
    main()
