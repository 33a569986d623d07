"""lessons/gateway_server.py, a server behind it, and that one's two pages, for the tests and the benchmark.

BEHIND is the server's app. By default it is that of ack_server.py, which sends again what the gateway held of
a connection that ended. Without acknowledgements the gateway's buffers would be one more piece of pipe, and
how much of a dead consumer's payloads went back to the queue would be a matter of how full they are.
"""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from http.client import HTTPConnection

from fastapi import FastAPI, Request, Response

from tests.kit.commands import uvicorn_command
from tests.kit.ports import free_port
from tests.kit.waiting import until

HEADERS = ["content-type", "content-security-policy"]  # of the pages
PORT = free_port()
os.environ["UPSTREAM"] = f"ws://127.0.0.1:{PORT}"  # which the lesson reads when it is imported

from lessons.gateway_server import app as gateway  # noqa: E402


def ask(path: str, method: str = "GET") -> Response:
    connection = HTTPConnection("127.0.0.1", PORT)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        headers = {name: value for name in HEADERS if (value := answer.getheader(name))}
        return Response(answer.read(), answer.status, headers)
    finally:
        connection.close()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """The server starts before the gateway, and ends after it: signals are for the gateway alone."""
    command = uvicorn_command(os.environ.get("BEHIND", "lessons.ack_server:app"))
    behind = await asyncio.to_thread(subprocess.Popen, [*command, str(PORT)], process_group=0)

    def answers() -> bool:
        with suppress(OSError):
            return bool(ask("/"))
        return False

    await until(answers, "the server behind the gateway")
    yield
    behind.terminate()
    await asyncio.to_thread(behind.wait)


app = FastAPI(lifespan=lifespan)


@app.get("/")
@app.get("/stats")
@app.get("/dead")
def page(request: Request) -> Response:
    return ask(request.url.path)


@app.post("/dead/retry")
def retry(request: Request) -> Response:
    return ask(request.url.path, "POST")


app.mount("/", gateway)
