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

When the connection breaks, the client connects and subscribes again. Delivery is at most once: what
is published in between is lost.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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
INBOX = 1000  # messages that wait for a slow callback; then the oldest is dropped
MAX_PAUSE = 8  # seconds between a connection that was closed and the next
LOCAL = ("localhost", "127.0.0.1", "::1")
log = logging.getLogger(__name__)
Message = dict[str, Any]  # topic, data, and from: the publisher's id
Callback = Callable[[Message], object]  # async or not


class PubSubClient:
    """A connection that is made again when it breaks. Its methods wait until it is there."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.id = ""  # of this connection; others can send() to it
        self.on_direct: Callback = log.info  # gets what others send() to our id, or to everyone
        self.on_error: Callable[[str], object] = log.error  # gets the reason of a refusal
        self._url = url
        self._token = token
        self._ready = asyncio.Event()
        self._subscriptions: list[tuple[str, Callback]] = []
        self._answers: dict[str, asyncio.Future[None]] = {}  # to subscribe(), by topic
        self._inbox: asyncio.Queue[Message] = asyncio.Queue(INBOX)
        self._missed = 0  # messages that were dropped since the log last said so

    async def __aenter__(self) -> Self:
        # This ends only with an exception: if it makes no sense to connect again.
        self.closed = asyncio.create_task(self._run())
        # Nobody must then wait for a connection any longer.
        self.closed.add_done_callback(lambda _: self._ready.set())
        self._caller = asyncio.create_task(self._call_back())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._caller.cancel()
        self.closed.cancel()
        await asyncio.gather(self.closed, self._caller, return_exceptions=True)

    async def wait_until_ready(self) -> None:
        """Wait until there is a connection and the server was told all subscriptions."""
        await self._ready.wait()
        self._raise_if_closed()

    def _raise_if_closed(self) -> None:
        if self.closed.cancelled():
            raise RuntimeError("the client is closed")
        if self.closed.done():
            self.closed.result()

    async def wait_for(self, answer: Awaitable[object], to: str) -> None:
        """Wait for an answer. Raise TimeoutError after TIMEOUT seconds, or what ends the client."""
        answered = asyncio.ensure_future(answer)
        either = [answered, self.closed]
        try:
            await asyncio.wait(either, timeout=TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            self._raise_if_closed()
            if not answered.done():
                raise TimeoutError(f"no answer to {to}")
        finally:
            answered.cancel()

    async def subscribe(self, topic: str | list[str], callback: Callback) -> None:
        """Call `callback` with each message that matches, once even if several filters match.

        `topic` is a filter, or a list of at most 1,000. Return when the server has confirmed them
        all. Raise ValueError if one is no filter, and TimeoutError after TIMEOUT seconds.
        """
        topics = [topic] if isinstance(topic, str) else topic
        for one in topics:
            check_filter(one)
        for one in topics:
            self._subscriptions.append((one, callback))
            self._answers.setdefault(one, asyncio.get_running_loop().create_future())
        answers = [self._answers[one] for one in topics]
        await self._tell(type="subscribe", topic=topic)
        if answers:
            await self.wait_for(asyncio.wait(answers), f"the subscription to {topic}")

    async def unsubscribe(self, topic: str | list[str]) -> None:
        topics = [topic] if isinstance(topic, str) else topic
        self._subscriptions = [entry for entry in self._subscriptions if entry[0] not in topics]
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
        # If the connection breaks, _run() connects again.
        with suppress(ConnectionClosed):
            await self._websocket.send(json.dumps(command, allow_nan=False))

    async def _run(self) -> None:
        """Connect, and connect again whenever the connection breaks."""
        connecting = connect(
            self._url,
            # HTTP_PROXY is for other machines: a proxy would look for 127.0.0.1 on its own machine.
            proxy=None if urlsplit(self._url).hostname in LOCAL else True,
            additional_headers={"Authorization": f"Bearer {self._token}"} if self._token else None,
            process_exception=give_up,
            close_timeout=1,
            max_size=None,
        )
        failures = 0
        async for websocket in connecting:
            # The server exists. If it goes away from now on, wait for it.
            connecting.process_exception = keep_trying
            self._websocket = websocket
            try:
                with suppress(ConnectionClosed):
                    async for text in websocket:
                        await self._handle(json.loads(text))
                        failures = 0
            finally:
                self._ready.clear()
                # What this server has confirmed, the next one has yet to confirm.
                waiting = {topic: one for topic, one in self._answers.items() if not one.done()}
                self._answers = waiting
                await websocket.close()
            reason = websocket.close_reason or "the server went away"
            closed = f"closed with {websocket.close_code}: {reason}"
            # 1008 is a policy violation: the next connection would end in the same way.
            if websocket.close_code == 1008:
                raise PermissionError(closed)
            log.warning("%s; connecting again", closed)
            failures += 1
            await asyncio.sleep(pause(failures))

    async def _handle(self, message: Message) -> None:
        match message:
            case {"type": "welcome", "id": str(name)}:
                for topic in {topic for topic, _ in self._subscriptions}:
                    await self._websocket.send(json.dumps({"type": "subscribe", "topic": topic}))
                self.id = name
                place = (message["pid"], message["host"])
                log.info("connected as %s to process %s on %s", name, *place)
                self._ready.set()
            case {"type": "subscribed", "topic": topic}:
                for one in [topic] if isinstance(topic, str) else topic:
                    if one in self._answers and not self._answers[one].done():
                        self._answers[one].set_result(None)
            case {"type": "message", "topic": _}:
                await self._keep(message)
            case {"type": "dropped", "count": None}:
                log.warning("messages between the server's processes were lost")
            case {"type": "dropped", "count": count}:
                log.warning("callbacks are too slow: %s messages were dropped", count)
            case {"type": "error", "reason": str(reason)}:
                self.on_error(reason)

    async def _keep(self, message: Message) -> None:
        """Let a message wait for the callbacks. If too many wait, drop the oldest."""
        # Do not wait for the callbacks. A client that stops reading answers no pings, and gets no
        # answers for a callback that subscribes.
        if self._inbox.full():
            await asyncio.sleep(0)  # lets them run
        if self._inbox.full():
            self._inbox.get_nowait()
            self._missed += 1
        self._inbox.put_nowait(message)

    async def _call_back(self) -> None:
        """Call the callbacks, one after another, in a task of their own: they may subscribe."""
        while True:
            message = await self._inbox.get()
            if self._missed:
                log.warning("callbacks are too slow: %s messages were dropped", self._missed)
                self._missed = 0
            for callback in self._callbacks(message["topic"]):
                try:
                    result = callback(message)
                    if isinstance(result, Awaitable):
                        await result
                except (Exception, asyncio.CancelledError):
                    # __aexit__() cancels this task. Otherwise, the callback awaited a task that
                    # was cancelled.
                    if self._caller.cancelling():
                        raise
                    log.exception("a callback failed, with a message of %s", message["topic"])

    def _callbacks(self, topic: str | None) -> list[Callback]:
        """Return what to call for a message, each callback once."""
        if topic is None:
            return [self.on_direct]
        found = [call for wanted, call in self._subscriptions if topic_matches_sub(wanted, topic)]
        return list(dict.fromkeys(found))


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


def check_filter(topic: str) -> None:
    """Raise ValueError if this is not a topic filter (MQTT 5, section 4.7)."""
    levels = topic.split("/")
    mixed = any(len(level) > 1 and ("+" in level or "#" in level) for level in levels)
    if not topic or mixed or "#" in levels[:-1]:
        raise ValueError(f"not a topic filter (MQTT 5, section 4.7): {topic}")


# The rest is the command. You do not need it in your own program.


def show(message: Message) -> None:
    try:
        print(json.dumps(message, ensure_ascii=False), flush=True)
    except BrokenPipeError:
        # The reader of our output has left, as in `| head -1`. In a task of asyncio, sys.exit() is
        # not clean: Python 3.14 prints what it interrupts.
        os._exit(0)


async def run(args: argparse.Namespace) -> None:
    async with PubSubClient(args.url, args.token) as client:
        client.on_error = sys.exit  # with the reason, and code 1
        if args.command == "subscribe":
            log.setLevel(logging.INFO)
            client.on_direct = show
            await client.subscribe([args.topic, *args.more], show)
            await client.closed
        echo: asyncio.Queue[Message] = asyncio.Queue()
        client.on_direct = echo.put_nowait
        async for text in in_thread(texts_to_publish(args.more)):
            await client.publish(args.topic, json.loads(text))
            # Send a message to ourselves. If the publish was refused, the error comes first.
            await client.send(client.id, "done")
            await client.wait_for(echo.get(), "the publish")


def texts_to_publish(arguments: list[str]) -> Iterator[str | bytes]:
    """Yield the arguments. If there are none, or only -, yield the lines of stdin."""
    if arguments in ([], ["-"]):
        yield from filter(bytes.strip, sys.stdin.buffer)
    else:
        yield from arguments


async def in_thread(texts: Iterator[str | bytes]) -> AsyncIterator[str | bytes]:
    """Read in a thread, so that the connection stays alive while nobody types."""
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(1)
    while (text := await loop.run_in_executor(thread, next, texts, None)) is not None:
        yield text


def main() -> None:
    parser = argparse.ArgumentParser(description="Subscribe and publish to pubsub_server.py.")
    parser.add_argument("command", choices=["subscribe", "publish"])
    parser.add_argument("topic")
    parser.add_argument("more", nargs="*", help="more topics, or JSON to publish (-: from stdin)")
    parser.add_argument("--url", default="ws://127.0.0.1:8000/ws")
    parser.add_argument("--token", help="for a server that asks for one")
    args = parser.parse_intermixed_args()
    logging.basicConfig(format="%(message)s")
    try:
        asyncio.run(run(args))
    except KeyboardInterrupt:
        # sys.exit() would wait until the thread has read its line.
        os._exit(130)
    except json.JSONDecodeError as error:
        sys.exit(f"not JSON: {error.doc:.60}")
    except RecursionError:
        sys.exit("not JSON: nested too deep")
    except (OSError, ValueError, WebSocketException) as error:
        sys.exit(f"{args.url}: {str(error) or 'no answer'}")


if __name__ == "__main__":
    main()
