# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Many workers, one queue: server.py with its queue in a process of its own, a multiprocessing manager's.

Run `python multiproc_server.py` (--host, --port, --workers), and the clients as with server.py: payloads go
from any worker to any. At most once, as there; and a worker that is killed loses what it was handing over, at
most BATCH payloads and one for each of its consumers. Read `diff server.py multiproc_server.py`.
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
import random
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
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
from uvicorn.supervisors import Multiprocess

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

CAPACITY = 1000  # payloads in the queue; then producers wait
FULL_TIMEOUT = 1  # seconds that a producer waits for room
FULL_PAUSE = 0.04  # seconds between two looks for room, on average
MAX_PAYLOAD = 1024 * 1024  # bytes of UTF-8
BURST = 32  # payloads that a consumer takes from a backlog before it is the next one's turn
BATCH = 256  # payloads that one call brings to the queue or from it
PATIENCE = 0.02  # seconds for which a worker waits for another that had less and asks no more
WAIT = 0.3  # seconds that a call waits for a payload
CSP = "default-src 'self' 'unsafe-inline'; script-src-attr 'none'; require-trusted-types-for 'script'; "
CSP += "frame-ancestors 'none'"  # no other site may show this page in a frame
log = logging.getLogger("uvicorn.error")  # the one that uvicorn shows, at INFO and above
# multiprocessing imports this file as __mp_main__ in the manager's process and in the workers.
if __name__ not in ("__main__", "__mp_main__"):
    if multiprocessing.current_process().name in ("MainProcess", "SpawnProcess-1"):  # say it once
        log.error("there is no queue: run python multiproc_server.py, which starts it, and the workers")
    sys.exit(3)  # which tells uvicorn not to try again


class SharedQueue:
    """The queue, in the manager's process. There, each thread that calls has a thread that runs its calls."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, str]] = []
        self.numbers = itertools.count()  # lowest first, so that a payload that comes back goes to the front
        self.changed = threading.Condition()
        self.workers: dict[int, tuple[float, float]] = {}  # what each got per consumer, and when

    def put(self, payloads: list[str]) -> int:
        """Queue the first of the payloads, as many as there is room for. Returns how many."""
        with self.changed:
            accepted = payloads[: max(0, CAPACITY - len(self.entries))]
            self.put_back([(next(self.numbers), payload) for payload in accepted])
        return len(accepted)

    def put_back(self, entries: list[tuple[int, str]]) -> None:
        with self.changed:
            for entry in entries:
                heapq.heappush(self.entries, entry)
            self.changed.notify_all()

    def allowance(self, worker: int) -> float:
        """How many payloads each consumer of a worker may have, so that no worker's get far ahead."""
        now, (served, asked) = time.monotonic(), self.workers.get(worker, (0, 0))
        others = [had for other, (had, at) in self.workers.items() if other != worker and now - at < PATIENCE]
        if others and now - asked > PATIENCE:  # it has been away, and starts level with the others
            served = max(served, min(others))
        self.workers[worker] = served, now
        return min([served, *others]) + 4 * BURST - served

    def take(self, worker: int, consumers: int) -> list[tuple[int, str]]:
        with self.changed:
            most = min(BATCH, int(self.allowance(worker) * consumers), len(self.entries))
            served, asked = self.workers[worker]
            self.workers[worker] = served + most / consumers, asked
            self.changed.notify_all()
            return [heapq.heappop(self.entries) for _ in range(most)]

    def wait(self, worker: int) -> None:
        """Wait for a payload, but do not take it: the worker that asked may be dead by then."""
        with self.changed:
            seconds = PATIENCE if self.entries else WAIT
            self.changed.wait_for(lambda: self.entries and self.allowance(worker) >= 1, seconds)

    def qsize(self) -> int:
        return len(self.entries)


@functools.cache
def shared_queue() -> SharedQueue:
    return SharedQueue()


class QueueManager(BaseManager):
    """Serves the queue on a socket in a private folder, to those who have inherited this run's random key."""


QueueManager.register("queue", shared_queue)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    global shared
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    manager = QueueManager(os.environ["QUEUE_ADDRESS"])
    manager.connect()
    shared = manager.queue()  # type: ignore[attr-defined]
    if parent := multiprocessing.parent_process():  # one that is killed cannot stop its workers
        asyncio.get_running_loop().add_reader(parent.sentinel, os.kill, os.getpid(), signal.SIGTERM)
    fetcher = asyncio.create_task(fetch())
    yield
    stopping.set()
    hungry.set()
    await fetcher


app = FastAPI(lifespan=lifespan)
shared: Any  # a proxy, whose methods are SharedQueue's
queue: asyncio.PriorityQueue[tuple[int, str]] = asyncio.PriorityQueue()  # what this worker has taken from it
threads = ThreadPoolExecutor(2)  # for calls: one that may wait for a payload, and one that does not wait
idle: set[WebSocket] = set()  # consumers that wait for a payload
hungry, stopping = asyncio.Event(), asyncio.Event()
turn = asyncio.Lock()  # idle consumers stand in line for it, so that a payload wakes only the first
line = asyncio.Lock()  # producers that wait for room


async def call(method: Callable[..., Any], *args: object) -> Any:
    """Call a method of the shared queue in a thread. Raises WebSocketException where its process is gone."""
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, method, *args)
    except (EOFError, OSError):
        raise WebSocketException(1012, "the process that holds the queue is gone") from None


async def fetch() -> None:
    """Take from the shared queue what the idle consumers can have now, and give back what they leave."""
    try:
        while not stopping.is_set():
            if not idle:
                hungry.clear()
                await hungry.wait()
            elif entries := await call(shared.take, os.getpid(), len(idle)):
                for entry in entries:
                    queue.put_nowait(entry)
                while idle and not queue.empty():  # until they have it all, or all wait for their sockets
                    await asyncio.sleep(0)
                if left := [queue.get_nowait() for _ in range(queue.qsize())]:
                    await call(shared.put_back, left)
            else:
                await call(shared.wait, os.getpid())
    except WebSocketException as gone:
        log.error("worker stops: %s", gone.reason)


async def same_origin(websocket: WebSocket) -> None:
    origin, host = websocket.headers.get("origin"), websocket.headers.get("host")  # RFC 6455, section 10.2
    if origin not in (None, f"http://{host}", f"https://{host}"):  # browsers always send it, scripts do not
        log.warning("a page from %s may not connect to %s: open the page at that address", origin, host)
        raise WebSocketException(1008)  # before accept(), so the client sees HTTP 403


def check(payload: str | None) -> str:
    """Return the payload; None is a binary frame. A WebSocketException says how to close."""
    if payload is None:
        raise WebSocketException(1003, "a binary frame: send payloads as text")
    if len(payload.encode()) > MAX_PAYLOAD:
        raise WebSocketException(1009, f"a payload has at most {MAX_PAYLOAD} bytes")
    try:
        from_json(payload, allow_inf_nan=False)
    except ValueError as error:
        raise WebSocketException(1007, f"not JSON: {error}") from None
    return payload


async def put(payloads: list[str]) -> int:
    """Queue the first of the payloads, as many as there is room for, at least one. Returns how many.

    Producers that find no room stand in line. Otherwise each would look for room at its own times, and one
    that always looks just after another would be refused, though room became free all the time.
    """
    if not line.locked() and (accepted := await call(shared.put, payloads)):
        return int(accepted)
    deadline = time.monotonic() + FULL_TIMEOUT
    try:
        async with asyncio.timeout(FULL_TIMEOUT):
            await line.acquire()
    except TimeoutError:
        raise WebSocketException(1013, "the queue is full: try again later") from None
    try:
        while not (accepted := await call(shared.put, payloads)):
            if time.monotonic() > deadline:
                raise WebSocketException(1013, "the queue is full: try again later")
            await asyncio.sleep(random.uniform(0.5, 1.5) * FULL_PAUSE)  # not in step with another worker
        return int(accepted)
    finally:
        line.release()


async def receive(websocket: WebSocket, payloads: list[str]) -> bool:
    """Wait for a payload, and add all that have come already. False where the producer has left."""
    message = await websocket.receive()
    with suppress(TimeoutError):
        async with asyncio.timeout(0):  # ends the first receive() that would have to wait
            while message["type"] == "websocket.receive":
                payloads.append(check(message.get("text")))
                if len(payloads) == BATCH:
                    return True
                message = await websocket.receive()
            return False
    return True


@app.websocket("/ws/producer", dependencies=[Depends(same_origin)])
async def producer(websocket: WebSocket) -> None:
    await websocket.accept()
    payloads: list[str] = []
    connected = True
    try:
        while connected:
            try:
                connected = await receive(websocket, payloads)
            finally:  # a payload that is refused does not harm those before it
                while payloads:
                    for _ in range(await put(payloads)):
                        with suppress(WebSocketDisconnect, RuntimeError):  # it left, but what it sent counts
                            await websocket.send_text(payloads.pop(0))
    except WebSocketException as refusal:
        log.warning("producer %s closed with %d: %s", websocket.client, refusal.code, refusal.reason)
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
            async with asyncio.timeout(FULL_TIMEOUT):  # a client that does not read can't be told
                await websocket.close(refusal.code, refusal.reason)
    except asyncio.CancelledError:  # by --timeout-graceful-shutdown; uvicorn would log a traceback
        log.warning("producer %s was cut off: it does not read its receipts", websocket.client)


async def send_payloads(websocket: WebSocket) -> None:
    for sent in itertools.count():
        if sent % BURST and not queue.empty():
            number, payload = queue.get_nowait()
        else:
            idle.add(websocket)
            hungry.set()
            try:
                async with turn:
                    number, payload = await queue.get()
            finally:
                idle.discard(websocket)
        try:
            await websocket.send_text(payload)
        except (WebSocketDisconnect, RuntimeError, asyncio.CancelledError):
            # Not written: uvicorn waits first, then writes. Not awaited: consumer() may cancel it there.
            threads.submit(shared.put_back, [(number, payload)])
            return


@app.websocket("/ws/consumer", dependencies=[Depends(same_origin)])
async def consumer(websocket: WebSocket) -> None:
    await websocket.accept()
    with suppress(asyncio.CancelledError):  # see producer()
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(send_payloads(websocket))
            while (await websocket.receive())["type"] == "websocket.receive":
                pass  # what it says is ignored, but only receive() tells that it left or the server stops
            sender.cancel()


@app.get("/stats")
async def stats() -> dict[str, int | bool]:
    return {"queued": await call(shared.qsize), "capacity": CAPACITY, "acks": False}


@app.get("/")
async def index() -> Response:
    page = Path(__file__).parent / "web/index.html"
    if page.exists():
        return FileResponse(page, headers={"Content-Security-Policy": CSP})
    return PlainTextResponse("A queue between websockets: send to /ws/producer, receive from /ws/consumer.")


def start_manager() -> None:
    """Run in the manager's process, which must end after the parent, however the parent ends."""
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
    parser = argparse.ArgumentParser(description="Forward one websocket to another, with many workers.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--ws", default="auto", metavar="MODULE:CLASS", help="uvicorn's websocket protocol")
    parser.add_argument("--ws-max-size", type=int, default=16 * MAX_PAYLOAD, metavar="BYTES")
    args = parser.parse_args()
    # A new process inherits the blocked signals. Ctrl+C and systemd signal every process of the group,
    # but the manager must outlive the workers. The resource tracker must start first, because its start
    # unblocks both signals.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    # The default start method differs between systems and Python versions. "spawn" works on all of
    # them. "fork" is unsafe on macOS. "forkserver" has a server process that dies if systemd sends
    # SIGTERM to the whole group.
    manager = QueueManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(start_manager)
    # SIGINT stays blocked here, because Ctrl+C would interrupt the imports of a worker with a traceback.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.environ["QUEUE_ADDRESS"] = str(manager.address)
    [process] = multiprocessing.active_children()
    threading.Thread(target=stop_after, args=[process], daemon=True).start()
    # In a worker too, __main__ is this file.
    # Compression would cost 2 to 5 times the CPU, for clients that offer it, as browsers do.
    options = {"timeout_graceful_shutdown": 1, "ws_per_message_deflate": False, **vars(args)}
    config = uvicorn.Config("__main__:app", **options)
    with manager, config.bind_socket() as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # uvicorn forgets: Kludex/uvicorn#3149
        # Without this line, uvicorn opens stdin again in each worker, and never closes it.
        sys.stdin = None
        Multiprocess(config, [listener]).run()
        if process.exitcode is not None:
            sys.exit("the process that held the queue died, and the queue with it")
        log.info("%d payloads were still queued", manager.queue().qsize())  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
