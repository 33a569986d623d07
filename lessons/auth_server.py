# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "uvicorn>=0.53", "websockets>=17.0", "starlette>=0.46",
#                 "pwdlib[argon2]>=0.3", "pyjwt>=2.15", "python-multipart>=0.0.18"]
# ///
"""Decide who may connect, and until when: server.py with passwords, tokens and scopes.

Run `python lessons/auth_server.py`, get a token from `POST /token`, and give it to the clients with
`--token`. Each payload goes to one consumer, at most once, as with server.py.
"""

import asyncio
import itertools
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import jwt
import uvicorn
from fastapi import Depends, FastAPI, Security, WebSocket, WebSocketDisconnect
from fastapi.exceptions import HTTPException, RequestValidationError, WebSocketException
from fastapi.requests import HTTPConnection, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import OAuth2PasswordRequestForm, SecurityScopes
from pwdlib import PasswordHash
from pydantic_core import from_json
from starlette.types import ASGIApp, Receive, Scope, Send

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

CAPACITY = 1000  # payloads
TIMEOUT = 1  # seconds to wait for space in the queue, and for a close frame to be sent
MAX_PAYLOAD = 1024 * 1024  # bytes of UTF-8
BURST = 32  # payloads that a consumer takes in one turn, at most
GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left
LIFETIME = 3600  # seconds until a token expires, and with it the connections that it opened
SECRET = os.environ.get("SECRET_KEY") or os.urandom(32).hex()  # at least 32 bytes
ALLOWED_ORIGINS: list[str] = []  # other sites whose pages may connect: "https://app.example"
ALICE = "$argon2id$v=19$m=65536,t=3,p=4$d1lX7gS5bXxAsJRPMHss3w$OEFLnYmpKMidPu0u/pV2Aw"  # wonderland
BOB = "$argon2id$v=19$m=65536,t=3,p=4$jk0iQMgbvBb311Ug3CPXcA$DBujl70NYlrEnZGUg0dXRA"  # builder
USERS = {"alice": (ALICE, {"produce", "consume"}), "bob": (BOB, {"consume"})}
log = logging.getLogger("uvicorn.error")  # uvicorn prints what this logger gets


class Channel:
    """A bounded queue, first in, first out, whose consumers take turns."""

    def __init__(self, capacity: int) -> None:
        # The lowest number comes out first, so a payload that goes back is the next one out.
        self.queue: asyncio.PriorityQueue[tuple[int, str]] = asyncio.PriorityQueue()
        self.numbers = itertools.count()
        # A payload takes up space until it is delivered, so there is always room to put it back.
        self.space = asyncio.Semaphore(capacity)
        self.consumers = 0  # how many take turns

    def qsize(self) -> int:
        """Count the payloads that wait for a consumer."""
        return self.queue.qsize()

    async def put(self, payload: str, max_wait: float | None = None) -> None:
        """Queue a payload. Raise TimeoutError if there is no space for `max_wait` seconds."""
        # Setting a timer for each payload would cost a third more, so set it only if we must wait.
        if self.space.locked():
            async with asyncio.timeout(max_wait):
                await self.space.acquire()
        else:
            await self.space.acquire()
        self.queue.put_nowait((next(self.numbers), payload))

    async def deliver(self, handle: Callable[[str], Awaitable[object]]) -> None:
        """Call `handle` with each payload. If it fails or is cancelled, the payload goes back."""
        self.consumers += 1
        remaining = 1  # payloads that this consumer takes before it lets the others run
        try:
            while True:
                # If get() has to wait, a new turn begins, with one payload.
                if self.queue.empty():
                    remaining = 1
                number, payload = await self.queue.get()
                try:
                    await handle(payload)
                except BaseException:
                    self.queue.put_nowait((number, payload))
                    raise
                self.space.release()
                remaining -= 1
                if remaining == 0 and not self.queue.empty():
                    # Let the others run. Nothing above pauses if all payloads can be sent at once.
                    await asyncio.sleep(0)
                    # Take only half of a fair share: the others get their shares of what is left.
                    share = self.queue.qsize() // self.consumers
                    remaining = max(1, min(BURST, share // 2))
        finally:
            self.consumers -= 1


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    if not os.environ.get("SECRET_KEY"):
        log.warning("SECRET_KEY is not set: tokens are valid only until this process ends")
    with suppress(asyncio.CancelledError):  # raised here if Ctrl+C is pressed twice
        yield  # until every endpoint has returned
    log.info("%d payloads were still queued", channel.qsize())


app = FastAPI(lifespan=lifespan)
channel = Channel(CAPACITY)
passwords = PasswordHash.recommended()
NOBODY = passwords.hash(os.urandom(32))
one_hash = asyncio.Lock()  # Argon2 takes 64 MiB for each password that it checks


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


async def same_origin(websocket: WebSocket) -> None:
    """Refuse web pages from other sites. Browsers send an Origin header, scripts do not."""
    origin = websocket.headers.get("origin")
    host = websocket.headers.get("host")
    if origin not in (None, f"http://{host}", f"https://{host}", *ALLOWED_ORIGINS):
        reason = f"a page from {origin} may not connect to {host}: open the page at that address"
        raise WebSocketException(1008, reason)


def check(token: str, needed: SecurityScopes) -> dict[str, Any]:
    """Return what a token says, or refuse it. Someone who forges tokens learns no details."""
    try:
        claims = jwt.decode(token[:4096], SECRET, ["HS256"], {"require": ["sub", "exp", "scope"]})
    except jwt.InvalidTokenError as error:
        reason = "has expired" if isinstance(error, jwt.ExpiredSignatureError) else "is not valid"
        headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        raise HTTPException(401, f"the token {reason}", headers) from None
    if not set(needed.scopes) <= set(str(claims["scope"]).split()):
        reason = f"a token with the scope {needed.scope_str} is needed"
        raise HTTPException(403, reason, {"WWW-Authenticate": 'Bearer error="insufficient_scope"'})
    return claims


async def bearer(connection: HTTPConnection, needed: SecurityScopes) -> dict[str, Any]:
    """Check the token in the header, or in the second subprotocol of a websocket."""
    headers = connection.headers.getlist("authorization")
    subprotocols = connection.scope.get("subprotocols", [])
    if len(headers) == 1 and headers[0].lower().startswith("bearer "):
        return check(headers[0][7:].strip(), needed)
    if not headers and len(subprotocols) == 2 and subprotocols[0] == "bearer":
        return check(subprotocols[1], needed)
    raise HTTPException(401, "a token is needed", {"WWW-Authenticate": "Bearer"})


async def session(websocket: WebSocket, needed: SecurityScopes) -> AsyncIterator[None]:
    """Accept the connection, and run the endpoint until the token expires."""
    await same_origin(websocket)
    claims = await bearer(websocket, needed)
    await websocket.accept("bearer" if "bearer" in websocket.scope["subprotocols"] else None)
    try:
        async with asyncio.timeout(int(claims["exp"]) - time.time()) as timer:
            yield
    finally:
        if timer.expired():
            raise WebSocketException(1008, "the token has expired")


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


@app.websocket("/ws/producer", dependencies=[Security(session, scopes=["produce"])])
async def producer(websocket: WebSocket) -> None:
    # If the producer does not read its receipts, uvicorn cancels this endpoint when it stops.
    with suppress(asyncio.CancelledError):
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            payload = validate(message.get("text"))
            try:
                await channel.put(payload, TIMEOUT)
            except TimeoutError:
                raise WebSocketException(1013, "the queue is full: try again later") from None
            # The receipt. The payload is queued, even if the producer has left meanwhile.
            with suppress(*GONE):
                await websocket.send_text(payload)


async def send_payloads(websocket: WebSocket) -> None:
    """Send payloads until the consumer leaves. One that cannot be sent goes back to the front."""
    with suppress(*GONE):
        await channel.deliver(websocket.send_text)


@app.websocket("/ws/consumer", dependencies=[Security(session, scopes=["consume"])])
async def consumer(websocket: WebSocket) -> None:
    # If the consumer does not read its payloads, uvicorn cancels this endpoint when it stops.
    with suppress(asyncio.CancelledError):
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(send_payloads(websocket))
            # Only receive() tells us that the consumer has left, or that uvicorn is stopping.
            while (await websocket.receive())["type"] != "websocket.disconnect":
                pass
            sender.cancel()


@app.post("/token")
async def log_in(form: Annotated[OAuth2PasswordRequestForm, Depends()]) -> JSONResponse:
    """Exchange a password for a token. An unknown user takes as long as a wrong password."""
    password_hash, allowed = USERS.get(form.username, (NOBODY, set()))
    password = form.password.encode(errors="surrogatepass")
    async with one_hash:
        if not await asyncio.to_thread(passwords.verify, password, password_hash):
            raise HTTPException(401, "wrong user name or password", {"WWW-Authenticate": "Bearer"})
    scope = " ".join(sorted(allowed & set(form.scopes or allowed)))
    claims = {"sub": form.username, "exp": int(time.time()) + LIFETIME, "scope": scope}
    token = jwt.encode(claims, SECRET, "HS256")
    answer = {"access_token": token, "token_type": "bearer", "expires_in": LIFETIME, "scope": scope}
    return JSONResponse(answer, headers={"Cache-Control": "no-store"})


@app.get("/stats", dependencies=[Depends(bearer)])
async def stats() -> dict[str, int | bool]:
    return {"queued": channel.qsize(), "capacity": CAPACITY, "acks": False}


@app.get("/")
async def index() -> Response:
    page = Path(__file__).parent.parent / "web/index.html"
    if page.exists():
        return FileResponse(page, headers={"Content-Security-Policy": "frame-ancestors 'none'"})
    return PlainTextResponse("A queue: send to /ws/producer, receive from /ws/consumer.")


if __name__ == "__main__":
    # Raise the limit, or a client with large cookies gets no answer. Compression costs much CPU.
    os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", "1000000")
    options = ["--timeout-graceful-shutdown=1", "--ws-per-message-deflate=false", *sys.argv[1:]]
    uvicorn.main(["__main__:app", *options])
