"""Clients of log_server.py and log_redis_server.py."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from http.client import HTTPConnection
from typing import Any

from websockets.asyncio.client import ClientConnection

from tests.kit.clients import client, narrow, receive, write
from tests.kit.commands import uvicorn_command
from tests.kit.servers import Server
from tests.kit.waiting import TIMEOUT

COMMANDS = {name: uvicorn_command(f"lessons.{name}:app") for name in ("log_server", "log_redis_server")}


class Consumer:
    """A consumer, and the status that it got first."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket
        self.status: dict[str, Any] = {}

    async def frame(self) -> dict[str, Any]:
        frame: dict[str, Any] = json.loads(await receive(self.websocket))
        return frame

    async def events(self, count: int) -> list[tuple[int, object]]:
        frames = [await self.frame() for _ in range(count)]
        return [(frame["offset"], frame["payload"]) for frame in frames]


@asynccontextmanager
async def consumer(
    server: Server, stream: str, after: str | None = None, **options: object
) -> AsyncIterator[Consumer]:
    query = "" if after is None else f"?after={after}"
    async with client(server, f"/ws/{stream}/consumer{query}", **options) as websocket:
        found = Consumer(websocket)
        if server.get("/stats")[0] == 200:  # not the naive version
            found.status = await found.frame()
            assert found.status.keys() == {"epoch", "first", "next", "recovered"}
        yield found


async def produce(server: Server, stream: str, payloads: list[str]) -> None:
    async with client(server, f"/ws/{stream}/producer") as producer:
        write(producer, payloads)
        for payload in payloads:
            assert await receive(producer) == payload


def request(server: Server, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)) as connection:
        connection.request(method, path, json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def start_job(server: Server, text: str) -> str:
    status, answer = request(server, "POST", "/jobs", text, **{"Content-Type": "application/json"})
    assert status == 200, answer
    stream: str = answer["stream"]
    return stream


@asynccontextmanager
async def event_source(server: Server, path: str, *headers: str) -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_connection(sock=narrow(server))
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
    writer.write("\r\n".join(lines).encode())
    try:
        async with asyncio.timeout(6 * TIMEOUT):
            yield reader
    finally:
        writer.close()
