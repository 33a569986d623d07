# /// script
# requires-python = ">=3.11"
# dependencies = ["paho-mqtt>=2", "websockets>=17.0"]
# ///
"""Subscribe and publish to pubsub_server.py, from a terminal or from a program.

    python lessons/pubsub_client.py subscribe 'sensors/#'
    python lessons/pubsub_client.py publish sensors/1/temp 21.5
    tail -f events.jsonl | python lessons/pubsub_client.py publish events -

    async with PubSubClient("ws://127.0.0.1:8000/ws") as client:
        await client.subscribe("sensors/+/temp", on_message)

When the server goes away, this waits for it and subscribes again. At most once: what comes meanwhile is lost.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Self
from urllib.parse import urlsplit

from paho.mqtt.client import topic_matches_sub
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

TIMEOUT = 10  # seconds to wait for an answer
INBOX = 1000  # messages that wait for a slow callback; then the server's buffer fills, and it drops some
PAUSE = 1  # seconds between a connection that was closed and the next
LOCAL = "localhost", "127.0.0.1", "::1"
log = logging.getLogger(__name__)
Message = dict[str, Any]  # topic, data, and from: the id of who published it
Callback = Callable[[Message], object]  # async or not


class PubSubClient:
    """A connection that is made again when it breaks; methods wait for it. Callbacks run one by one."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.id = ""  # of this connection: what others send() to it comes to on_direct()
        self.on_direct: Callback = log.info
        self.on_error: Callable[[str], object] = log.error  # gets the reason of a refusal
        self._url, self._token, self._ready = url, token, asyncio.Event()
        self._subscriptions: list[tuple[str, Callback]] = []
        self._answers: dict[str, asyncio.Future[None]] = {}  # to subscribe(), by topic
        self._inbox: asyncio.Queue[Message] = asyncio.Queue(INBOX)

    async def __aenter__(self) -> Self:
        self.closed = asyncio.create_task(self._run())  # ends with an exception where there is no way back
        self.closed.add_done_callback(lambda _: self._ready.set())  # nobody is to wait any longer
        self._caller = asyncio.create_task(self._call_back())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._caller.cancel()
        self.closed.cancel()
        await asyncio.gather(self.closed, self._caller, return_exceptions=True)

    async def wait_until_ready(self) -> None:
        """Wait until there is a connection, and the server was told all subscriptions."""
        await self._ready.wait()
        if self.closed.done():
            self.closed.result()

    async def subscribe(self, topic: str | list[str], callback: Callback) -> None:
        """Call back with each message that matches: once, also where several of its filters match.

        Returns when the server has subscribed us to all of a list's topics, of which there are 1,000 at most.
        Raises ValueError for what is no filter, or TimeoutError.
        """
        topics = [topic] if isinstance(topic, str) else topic
        for one in topics:
            levels = one.split("/")
            if (
                not one
                or "#" in levels[:-1]
                or any({"+", "#"} & set(level) and level[1:] for level in levels)
            ):
                raise ValueError(f"not a topic filter (MQTT 5, section 4.7): {one}")
        self._subscriptions += [(one, callback) for one in topics]
        loop = asyncio.get_running_loop()
        answers = [self._answers.setdefault(one, loop.create_future()) for one in topics]
        await self._tell(type="subscribe", topic=topic)
        answer = asyncio.ensure_future(asyncio.wait(answers))
        done, _ = await asyncio.wait([answer, self.closed], timeout=TIMEOUT, return_when="FIRST_COMPLETED")
        answer.cancel()
        if self.closed in done:
            self.closed.result()
        if not done:
            raise TimeoutError(f"no answer to the subscription to {topic}")

    async def unsubscribe(self, topic: str | list[str]) -> None:
        topics = {topic} if isinstance(topic, str) else set(topic)
        self._subscriptions = [(wanted, call) for wanted, call in self._subscriptions if wanted not in topics]
        for one in topics:
            self._answers.pop(one, None)
        await self._tell(type="unsubscribe", topic=topic)

    async def publish(self, topic: str, data: Any) -> None:
        await self._tell(type="publish", topic=topic, data=data)

    async def send(self, to: str | list[str], data: Any) -> None:
        """Send to the connections with these ids. An id that nobody has is no error."""
        await self._tell(type="send", to=to, data=data)

    async def _tell(self, **command: Any) -> None:
        await self.wait_until_ready()
        with suppress(ConnectionClosed):  # _run() hears of it too
            await self._websocket.send(json.dumps(command, allow_nan=False))

    async def _run(self) -> None:
        def retry(error: Exception) -> Exception | None:
            refused = isinstance(error, InvalidStatus) and error.response.status_code < 500
            return None if self.id and not refused else error  # None: try again

        headers = {"Authorization": f"Bearer {self._token}"} if self._token else None
        # HTTP_PROXY is for other machines: a proxy would look for 127.0.0.1 on its own machine.
        proxy = None if urlsplit(self._url).hostname in LOCAL else True
        options: Any = {"additional_headers": headers, "max_size": None, "close_timeout": 1, "proxy": proxy}
        async for websocket in connect(self._url, process_exception=retry, **options):
            self._websocket = websocket
            try:
                with suppress(ConnectionClosed):
                    async for text in websocket:
                        await self._hear(json.loads(text))
            finally:
                self._ready.clear()
                await websocket.close()
            closed = f"closed with {websocket.close_code}: {websocket.close_reason or 'the server went away'}"
            if websocket.close_code == 1008:  # policy violation: the next connection would end like this one
                raise PermissionError(closed)
            log.warning("%s; connecting again", closed)
            await asyncio.sleep(PAUSE)

    async def _hear(self, message: Message) -> None:
        match message:
            case {"type": "welcome", "id": str(name)}:
                for topic in {topic for topic, _ in self._subscriptions}:
                    await self._websocket.send(json.dumps({"type": "subscribe", "topic": topic}))
                self.id = name
                log.info("connected as %s to process %s on %s", name, message["pid"], message["host"])
                self._ready.set()
            case {"type": "subscribed", "topic": topic}:
                for one in [topic] if isinstance(topic, str) else topic:
                    if one in self._answers and not self._answers[one].done():
                        self._answers[one].set_result(None)
            case {"type": "message", "topic": _}:
                await self._inbox.put(message)
            case {"type": "dropped", "count": None}:
                log.warning("messages between the server's processes were lost")
            case {"type": "dropped", "count": count}:
                log.warning("callbacks are too slow: %s messages were dropped", count)
            case {"type": "error", "reason": str(reason)}:
                self.on_error(reason)

    async def _call_back(self) -> None:
        while True:
            message = await self._inbox.get()
            callbacks, topic = [self.on_direct], message["topic"]
            if topic is not None:
                callbacks = [call for want, call in self._subscriptions if topic_matches_sub(want, topic)]
            for callback in dict.fromkeys(callbacks):
                try:
                    if isinstance(result := callback(message), Awaitable):
                        await result
                except Exception:
                    log.exception("a callback failed, with a message of %s", topic)


def show(message: Message) -> None:
    try:
        print(json.dumps(message, ensure_ascii=False), flush=True)
    except BrokenPipeError:
        # The reader of our output has left, as in `| head -1`. In a task of asyncio, sys.exit() is not
        # clean: Python 3.14 prints what it interrupts.
        os._exit(0)


async def run(args: argparse.Namespace) -> None:
    async with PubSubClient(args.url, args.token) as client:
        client.on_error = sys.exit  # with the reason, and code 1
        if args.command == "subscribe":
            log.setLevel(logging.INFO)
            client.on_direct = show
            await client.subscribe([args.topic, *args.more], show)
            await client.closed
        texts: Any = iter(filter(bytes.strip, sys.stdin.buffer) if args.more in ([], ["-"]) else args.more)
        loop, thread, echo = asyncio.get_running_loop(), ThreadPoolExecutor(), asyncio.Queue[Message]()
        client.on_direct = echo.put_nowait
        while (text := await loop.run_in_executor(thread, next, texts, None)) is not None:
            await client.publish(args.topic, json.loads(text))
            await client.send(client.id, "done")  # to ourselves: it comes behind an error
            await asyncio.wait_for(echo.get(), TIMEOUT)


def main() -> None:
    parser = argparse.ArgumentParser(description="Subscribe and publish to pubsub_server.py.")
    parser.add_argument("command", choices=["subscribe", "publish"])
    parser.add_argument("topic")
    parser.add_argument("more", nargs="*", help="more topics; or JSON to publish, - for lines of stdin")
    parser.add_argument("--url", default="ws://127.0.0.1:8000/ws")
    parser.add_argument("--token", help="for a server that asks who one is")
    args = parser.parse_intermixed_args()
    logging.basicConfig(format="%(message)s")
    try:
        asyncio.run(run(args))
    except KeyboardInterrupt:
        os._exit(130)  # sys.exit() would wait until the thread has read its line
    except json.JSONDecodeError as error:
        sys.exit(f"not JSON: {error.doc:.60}")
    except RecursionError:  # of which each Python says something else
        sys.exit("not JSON: nested too deep")
    except (OSError, ValueError, WebSocketException) as error:
        sys.exit(f"{args.url}: {str(error) or 'no answer'}")


if __name__ == "__main__":
    main()
