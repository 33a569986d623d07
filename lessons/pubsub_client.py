# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=16.0"]
# ///
"""Subscribe and publish to pubsub_server.py, from a terminal or from a program.

    python lessons/pubsub_client.py subscribe 'sensors/#'
    python lessons/pubsub_client.py publish sensors/1/temp 21.5
    tail -f events.jsonl | python lessons/pubsub_client.py publish events -

    async with PubSubClient("ws://127.0.0.1:8000/ws") as client:
        await client.subscribe("sensors/+/temp", on_message)
        await client.publish("sensors/1/temp", 21.5)

When the server goes away, this waits for it and subscribes again. At most once: what comes meanwhile is lost.
"""

import argparse
import asyncio
import concurrent.futures
import inspect
import itertools
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

INBOX = 10_000  # messages that wait for a slow callback
WELCOME = 10  # seconds to wait for the server's first word
PAUSE = 1  # seconds between a connection that was closed and the next
MARK = "$mark/"  # begins topics that nobody subscribes to
log = logging.getLogger(__name__)
Message = dict[str, Any]
Callback = Callable[[Message], object]


def matches(wanted: str, topic: str) -> bool:
    """Whether a topic matches a filter, by the rules of MQTT 5, section 4.7."""
    levels, filters = topic.split("/"), wanted.split("/")
    if topic.startswith("$") and filters[0] in ("+", "#"):
        return False
    if filters[-1] == "#":
        filters.pop()
        levels = levels[: len(filters)]  # which may be all of them: # matches its parent level too
    return len(levels) == len(filters) and all(
        wild in ("+", level) for wild, level in zip(filters, levels, strict=True)
    )


class PubSubClient:
    """A connection that is made again when it breaks, and the callbacks for the messages that come.

    A callback, async or not, gets the message as the server sent it: a dict of `topic`, `data`, and `from`,
    the id of the connection that published it. Callbacks run one after the other, in the order of messages.
    A slow one does not hold up the connection; where INBOX messages wait for it, the oldest is dropped. What
    a callback raises is logged. `on_direct` gets messages without a topic: those for our `id`, or for all.

    Where there is no server at the start, `async with` raises OSError or WebSocketException. Later, methods
    wait until it is back, or raise what wait_closed() does.
    """

    def __init__(
        self, url: str, token: str | None = None, on_direct: Callback = lambda message: None
    ) -> None:
        self.id = ""  # to which others send(): another for each connection
        self._url, self._token, self._on_direct = url, token, on_direct
        self._subscriptions: dict[tuple[str, Callback], None] = {}
        self._inbox: asyncio.Queue[Message] = asyncio.Queue(INBOX)
        self._dropped = 0
        self._ready = asyncio.Event()
        self._sending = asyncio.Lock()
        self._numbers = itertools.count()
        self._answers: dict[str, asyncio.Queue[Exception | None]] = {}
        self._errors: list[str] = []

    async def __aenter__(self) -> Self:
        self._runner = asyncio.create_task(self._run())
        self._runner.add_done_callback(lambda _: self._ready.set())  # nobody is to wait any longer
        self._caller = asyncio.create_task(self._call_back())
        try:
            await asyncio.wait_for(self.wait_until_ready(), WELCOME)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._runner.cancel()
        self._caller.cancel()
        await asyncio.wait([self._runner, self._caller])

    async def wait_until_ready(self) -> None:
        """Wait until there is a connection, with all subscriptions."""
        while not self._ready.is_set():
            await self._ready.wait()
        if self._runner.cancelled():
            raise RuntimeError("the client is closed")
        if self._runner.done():
            self._runner.result()

    async def wait_closed(self) -> None:
        """Wait until the server wants us no more. Raises PermissionError or InvalidStatus, which say why."""
        await asyncio.wait([self._runner])
        await self.wait_until_ready()

    async def subscribe(self, topic: str, callback: Callback) -> None:
        """Call `callback` with each message that matches: once, also where several of its filters match.

        Returns once the server has subscribed us. Raises ValueError with its reason where it does not.
        """
        self._subscriptions[topic, callback] = None  # first: a message may come right behind the answer
        try:
            while True:
                with suppress(ConnectionResetError):
                    return await self._ask("subscribe", topic=topic)
        except BaseException:
            self._subscriptions.pop((topic, callback), None)
            raise

    async def unsubscribe(self, topic: str) -> None:
        """Call the callbacks of this filter no more."""
        self._subscriptions = {key: None for key in self._subscriptions if key[0] != topic}
        with suppress(ConnectionResetError):  # the next connection will not subscribe to it
            await self._ask("unsubscribe", topic=topic)

    async def publish(self, topic: str, data: Any) -> None:
        """Publish, and return once the server has taken it.

        Raises ValueError with the server's reason where it does not, ConnectionResetError where it went away
        before it answered: then the message was published, or not.
        """
        await self._ask("publish", topic=topic, data=data)

    async def send(self, to: str | list[str], data: Any) -> None:
        """Send to the connections with these ids, as publish() does. An id that nobody has is no error."""
        await self._ask("send", to=to, data=data)

    async def _ask(self, type: str, **fields: Any) -> None:
        """Have the server do something, and wait until it has.

        It obeys in order, but has no answer to a message that it takes. So behind each command goes another
        that does nothing and has an answer. The errors that come before that are about the command.
        """
        command = json.dumps({"type": type, **fields}, ensure_ascii=False, allow_nan=False).encode()
        await self.wait_until_ready()
        websocket, mark = self._websocket, f"{MARK}{next(self._numbers)}"
        answer = self._answers[mark] = asyncio.Queue()
        try:
            async with self._sending:
                with suppress(ConnectionClosed):  # _run() sees it too, and answers
                    await websocket.send(command, text=True)
                    await websocket.send(json.dumps({"type": "unsubscribe", "topic": mark}))
            if error := await answer.get():
                raise error
        finally:
            del self._answers[mark]

    async def _run(self) -> None:
        def retry(error: Exception) -> Exception | None:
            """Answer None, try again, where the server was there before and may come back."""
            refused = isinstance(error, InvalidStatus) and error.response.status_code < 500
            return None if self.id and not refused else error

        headers = {"Authorization": f"Bearer {self._token}"} if self._token else None
        options: Any = {"additional_headers": headers, "process_exception": retry}
        async for websocket in connect(self._url, **options, close_timeout=1, max_size=None):
            self._websocket = websocket
            try:
                async for text in websocket:
                    await self._hear(json.loads(text))
            except ConnectionClosed:
                pass
            finally:
                self._ready.clear()
                self._errors.clear()
                await websocket.close()
                reason = websocket.close_reason or "the server went away"
                closed = f"closed with {websocket.close_code}: {reason}"
                for answer in self._answers.values():
                    answer.put_nowait(ConnectionResetError(closed))
            if websocket.close_code == 1008:  # policy violation: the next connection would end like this one
                raise PermissionError(closed)
            log.warning("%s; connecting again", closed)
            await asyncio.sleep(PAUSE)

    async def _hear(self, message: Message) -> None:
        match message:
            case {"type": "welcome", "id": str(name), "host": host, "pid": pid}:
                self.id = name
                log.info("connected as %s to process %s on %s", name, pid, host)
                topics = dict.fromkeys(topic for topic, _ in self._subscriptions)
                for type, topic in [*(("subscribe", topic) for topic in topics), ("unsubscribe", MARK)]:
                    await self._websocket.send(json.dumps({"type": type, "topic": topic}))
            case {"type": "message", "topic": str() | None}:
                if self._inbox.full():
                    self._inbox.get_nowait()
                    self._dropped += 1
                self._inbox.put_nowait(message)
                await asyncio.sleep(0)  # a turn for the callbacks: many messages may have come in one piece
            case {"type": "dropped", "count": count}:
                log.warning("the connection is too slow: %s messages were dropped", count)
            case {"type": "error", "reason": str(reason)}:
                self._errors.append(reason)
            case {"type": "unsubscribed", "topic": str(mark)} if mark.startswith(MARK):
                error = ValueError("; ".join(self._errors)) if self._errors else None
                self._errors.clear()
                if mark in self._answers:
                    self._answers[mark].put_nowait(error)
                elif mark == MARK:
                    if error:
                        log.error("not subscribed again: %s", error)
                    self._ready.set()

    async def _call_back(self) -> None:
        while True:
            message = await self._inbox.get()
            if self._dropped:
                log.warning("callbacks are too slow: %d messages were dropped", self._dropped)
                self._dropped = 0
            callbacks = [self._on_direct]
            if (topic := message["topic"]) is not None:
                callbacks = [callback for wanted, callback in self._subscriptions if matches(wanted, topic)]
            for callback in dict.fromkeys(callbacks):
                try:
                    result = callback(message)
                    if inspect.isawaitable(result):
                        await result
                except Exception:
                    log.exception("a callback failed, with a message of %s", topic)


async def subscribe(args: argparse.Namespace) -> str | None:
    log.setLevel(logging.INFO)
    messages: asyncio.Queue[Message] = asyncio.Queue()

    async def show() -> None:
        while True:
            print(json.dumps(await messages.get(), ensure_ascii=False), flush=True)

    async with PubSubClient(args.url, args.token, on_direct=messages.put_nowait) as client:
        for topic in args.filters:
            try:
                await client.subscribe(topic, messages.put_nowait)
            except ValueError as error:
                return f"{topic}: {error}"
            log.info("subscribed to %s", topic)
        await asyncio.gather(client.wait_closed(), show())
    return None


async def publish(args: argparse.Namespace) -> str | None:
    async with PubSubClient(args.url, args.token) as client:
        if args.json != "-":
            try:
                await client.publish(args.topic, parse(args.json))
            except ValueError as error:
                return str(error)
            return None
        end: asyncio.Queue[str | None] = asyncio.Queue()
        lines = (client, args.topic, asyncio.get_running_loop(), end)
        # A daemon: the thread of an asyncio.to_thread() would hold up Ctrl+C until the next line comes.
        threading.Thread(target=publish_lines, args=lines, daemon=True).start()
        return await end.get()


def parse(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def publish_lines(
    client: PubSubClient, topic: str, loop: asyncio.AbstractEventLoop, end: asyncio.Queue[str | None]
) -> None:
    """Publish the lines of standard input. Put into `end` what is wrong with one of them, or None."""
    number, problem = 0, None
    with suppress(RuntimeError, concurrent.futures.CancelledError):  # the loop has ended
        try:
            # Not sys.stdin: Python wants its lock when it exits.
            with os.fdopen(0, "rb", closefd=False) as file:
                for number, line in enumerate(file, 1):  # noqa: B007
                    if line.strip():
                        publishing = client.publish(topic, parse(line))
                        asyncio.run_coroutine_threadsafe(publishing, loop).result()
        except (OSError, ValueError, WebSocketException) as error:
            problem = f"line {number}: {error}"
        loop.call_soon_threadsafe(end.put_nowait, problem)


def main() -> int | str | None:
    parser = argparse.ArgumentParser(description="Subscribe and publish to pubsub_server.py.")
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--url", default="ws://127.0.0.1:8000/ws")
    options.add_argument("--token", help="for a server that asks who one is")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("subscribe", parents=[options], help="print messages, a JSON a line")
    command.add_argument("filters", nargs="+", metavar="FILTER", help="such as a/b, a/+/c or a/#")
    command.set_defaults(run=subscribe)
    command = commands.add_parser("publish", parents=[options], help="publish a message, or many")
    command.add_argument("topic", metavar="TOPIC")
    command.add_argument("json", metavar="JSON", help="or - for the lines of standard input")
    command.set_defaults(run=publish)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    try:
        problem: str | None = asyncio.run(args.run(args))
        return problem
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has left, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return None
    except (OSError, ValueError, WebSocketException) as error:  # a ValueError is a bad URL
        return f"{args.url}: {str(error) or 'no answer'}"


if __name__ == "__main__":
    sys.exit(main())
