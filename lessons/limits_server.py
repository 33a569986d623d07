# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "uvicorn>=0.53", "websockets>=17.0", "starlette>=0.46",
#                 "python-multipart>=0.0.18"]
# ///
"""Limit how much one client may use: connections, rate, idle time, lifetime and failed logins.

Run `python lessons/limits_server.py`. It takes payloads like server.py, but has no queue, so that
you read only the limits. `seq 3000 | python ws_producer_client.py -` takes two seconds: 1,000
payloads pass at once, and then 1,000 a second. Your server's delivery guarantee stays the same.
"""

import asyncio
import ipaddress
import logging
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, MutableMapping
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect
from fastapi.exceptions import HTTPException, RequestValidationError, WebSocketException
from fastapi.requests import HTTPConnection, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import OAuth2PasswordRequestForm
from pydantic_core import from_json
from starlette.types import ASGIApp, Receive, Scope, Send

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

TIMEOUT = 1  # seconds to wait for a close frame to be sent
MAX_PAYLOAD = 1024 * 1024  # bytes of UTF-8
MAX_CONNECTIONS = 100  # of one client
MAX_LIFETIME = 1800  # seconds until a client must connect again
IDLE_TIMEOUT = 600  # seconds to wait for the next payload
RATE = 1000  # payloads a second on one connection; after a pause, as many at once
MAX_DELAY = 10  # seconds of throttling until the connection is closed; less than a ping timeout
MAX_FAILURES = 5  # logins that may fail for one name, or from one client, in LOGIN_WINDOW
LOGIN_WINDOW = 60  # seconds
GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left
log = logging.getLogger("uvicorn.error")  # uvicorn prints what this logger gets


class Bucket:
    """A token bucket: each payload takes a token, and RATE tokens come back every second."""

    def __init__(self) -> None:
        self.tokens: float = RATE
        self.filled = time.monotonic()
        self.delay = 0.0

    async def take(self) -> None:
        """Take a token. Wait for one if there is none, for at most MAX_DELAY seconds in all."""
        now = time.monotonic()
        self.tokens += (now - self.filled) * RATE
        self.filled = now
        if self.tokens >= RATE:
            # The bucket is full, so the client has made a pause.
            self.tokens = RATE
            self.delay = 0.0
        self.tokens -= 1
        if self.tokens < 0:
            if self.delay > MAX_DELAY:
                raise WebSocketException(1008, f"more than {RATE} payloads a second")
            # Meanwhile the server does not read, so TCP slows the client down.
            await asyncio.sleep(-self.tokens / RATE)
            # Count the time that has passed: a sleep takes longer than it should.
            self.delay += time.monotonic() - now


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    with suppress(asyncio.CancelledError):  # raised here if Ctrl+C is pressed twice
        yield


app = FastAPI(lifespan=lifespan)
connections: Counter[str] = Counter()  # by client
failures: Counter[str] = Counter()  # by name, and by client


def refuse_if_cancelled(app: ASGIApp) -> ASGIApp:
    """Answer 503 to a request that still waits when the server stops: uvicorn cancels it."""

    async def call_app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            # Sending raises RuntimeError if the response has begun.
            with suppress(RuntimeError):
                response = JSONResponse({"detail": "the server is stopping"}, 503)
                await response(scope, receive, send)

    return call_app


app.add_middleware(refuse_if_cancelled)


def release(counter: Counter[str], keys: Iterable[str]) -> None:
    """Count one less, and forget keys that are no longer counted, or they would fill the memory."""
    for key in keys:
        counter[key] -= 1
        if counter[key] <= 0:
            del counter[key]


async def client_of(connection: HTTPConnection) -> str:
    """Return the client's address, or its /64 network, since one IPv6 client has all of that."""
    host = connection.client.host if connection.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address), 64), strict=False))


async def limit_connections(client: Annotated[str, Depends(client_of)]) -> AsyncIterator[None]:
    """Refuse a client with MAX_CONNECTIONS, and end each connection after MAX_LIFETIME."""
    if connections[client] >= MAX_CONNECTIONS:
        reason = f"{client} has {MAX_CONNECTIONS} connections already"
        log.warning("%s", reason)
        raise HTTPException(429, reason)
    connections[client] += 1
    try:
        async with asyncio.timeout(MAX_LIFETIME) as timer:
            yield
    finally:
        release(connections, [client])
        if timer.expired():
            raise WebSocketException(1001, f"{MAX_LIFETIME} s are over: connect again")


async def limit_logins(
    request: Request, form: Annotated[OAuth2PasswordRequestForm, Depends()]
) -> AsyncIterator[None]:
    """Refuse a login if too many logins have failed for this name, or from this client."""
    keys = [f"name {form.username[:99]}", f"client {await client_of(request)}"]
    if any(failures[key] >= MAX_FAILURES for key in keys):
        raise HTTPException(429, "too many failed logins", {"Retry-After": str(LOGIN_WINDOW)})
    # Count it as failed until it succeeds, or a hundred guesses at once would all be checked.
    failures.update(keys)
    loop = asyncio.get_running_loop()
    forget = loop.call_later(LOGIN_WINDOW, release, failures, keys)
    yield
    # The endpoint has raised no exception, so the login has succeeded. Take the count back, unless
    # the timer has done that already.
    if loop.time() < forget.when():
        forget.cancel()
        release(failures, keys)


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


@app.exception_handler(RequestValidationError)
async def unprocessable(_: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong. FastAPI would repeat the input, and fail if JSON cannot hold it."""
    problems = [{"loc": problem["loc"], "msg": problem["msg"]} for problem in error.errors()]
    return JSONResponse({"detail": problems}, 422)


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


async def receive(websocket: WebSocket) -> MutableMapping[str, Any]:
    """Return the next message, or close the connection if none comes for IDLE_TIMEOUT seconds."""
    try:
        async with asyncio.timeout(IDLE_TIMEOUT):
            return await websocket.receive()
    except TimeoutError:
        raise WebSocketException(1001, f"nothing was sent for {IDLE_TIMEOUT} s") from None


@app.websocket("/ws/producer", dependencies=[Depends(same_origin), Depends(limit_connections)])
async def producer(websocket: WebSocket) -> None:
    await websocket.accept()
    bucket = Bucket()
    # If the producer does not read its receipts, uvicorn cancels this endpoint when it stops.
    with suppress(asyncio.CancelledError):
        while (message := await receive(websocket))["type"] != "websocket.disconnect":
            await bucket.take()
            payload = validate(message.get("text"))
            # The receipt. server.py would queue the payload first.
            with suppress(*GONE):
                await websocket.send_text(payload)


@app.post("/token", dependencies=[Depends(limit_logins)])
async def log_in(form: Annotated[OAuth2PasswordRequestForm, Depends()]) -> dict[str, str]:
    """Stand in for auth_server.py, which checks the hash of a password, and returns a token."""
    if not secrets.compare_digest(form.password.encode(errors="surrogatepass"), b"wonderland"):
        raise HTTPException(401, "wrong user name or password", {"WWW-Authenticate": "Bearer"})
    return {"hello": ascii(form.username)}


@app.get("/")
async def index() -> PlainTextResponse:
    return PlainTextResponse("Limits: send to /ws/producer, log in at /token.")


if __name__ == "__main__":
    # Raise the limit, or a client with large cookies gets no answer. Compression costs much CPU.
    os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", "1000000")
    options = ["--timeout-graceful-shutdown=1", "--ws-per-message-deflate=false", *sys.argv[1:]]
    # By default, a client on this machine may claim in X-Forwarded-For to be any other client.
    uvicorn.main(["__main__:app", "--no-proxy-headers", *options])
