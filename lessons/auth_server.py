# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "uvicorn>=0.53", "websockets>=17.0", "pwdlib[argon2]>=0.3",
#                 "pyjwt>=2.15", "python-multipart>=0.0.18", "starlette>=0.46"]
# ///
"""Who may connect, for how long, and how much: server.py, behind a door.

Run `python lessons/auth_server.py`. Both clients end with HTTP 401; with `--token TOKEN` they work until it
expires. A token comes from `curl -d username=alice -d password=wonderland http://127.0.0.1:8000/token`.
At most once, as server.py. Read `diff server.py lessons/auth_server.py`.
"""

import asyncio
import ipaddress
import itertools
import logging
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import jwt
import uvicorn
from fastapi import Depends, FastAPI, Security, WebSocket, WebSocketDisconnect
from fastapi.exceptions import HTTPException, WebSocketException
from fastapi.requests import HTTPConnection, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from fastapi.security import OAuth2PasswordRequestForm, SecurityScopes
from pwdlib import PasswordHash
from pydantic_core import from_json

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

CAPACITY = 1000  # payloads in the queue; then producers wait
FULL_TIMEOUT = 1  # seconds that a producer waits for room
MAX_PAYLOAD = 1024 * 1024  # bytes of UTF-8
BURST = 32  # payloads that a consumer takes from a backlog before it is the next one's turn
TOKEN_LIFESPAN = 3600  # seconds until a token expires, and with it the connections that it opened
MAX_LIFESPAN = 1800  # seconds until a client has to connect again, however long its token is valid
AUTH_TIMEOUT = 5  # seconds that a client has for its first message, where that is the token
IDLE_AFTER = 600  # seconds for which a producer may say nothing
MAX_CONNECTIONS = 100  # of one user
RATE = 1000  # payloads a second from one producer; after a pause, as many at once
RATE_TIMEOUT = 10  # seconds that one which sends more has to wait, in all; less than a pong may take
MAX_FAILURES, LOGIN_WINDOW = 5, 60  # logins that may fail for a name, or from an address, in so many seconds
SECRET_KEY = os.environ.get("SECRET_KEY") or secrets.token_hex()  # 32 bytes or more: who has it makes tokens
ALLOWED_ORIGINS: list[str] = []  # of pages that others serve, such as "https://app.example"
CSP = "default-src 'self' 'unsafe-inline'; script-src-attr 'none'; require-trusted-types-for 'script'; "
CSP += "frame-ancestors 'none'"  # no other site may show this page in a frame
log = logging.getLogger("uvicorn.error")  # the one that uvicorn shows, at INFO and above

# python -c "from pwdlib import PasswordHash; print(PasswordHash.recommended().hash('wonderland'))"
# Bob's is 'builder'; nobody's, for users that don't exist, was thrown away.
ALICE = "$argon2id$v=19$m=65536,t=3,p=4$N+ae+v4qoPCURyWPtQvPJg$s9jKrUyIWbJHjDLE7we6Vn5Fm+dkovnft42JDfx2rVw"
BOB = "$argon2id$v=19$m=65536,t=3,p=4$GXxs8x/tC78eT85OkwJq2Q$UPQYDjDcisCWJEbTL6+whwewMx8ht/dKR+mj15cYzpU"
NOBODY = "$argon2id$v=19$m=65536,t=3,p=4$0nn8O9Z+zBQ7K0buhTWBeg$aCmeNjmcxTVdwOeYmIiKG0TehX2QShccHDKM16Coivo"
USERS = {"alice": (ALICE, {"produce", "consume"}), "bob": (BOB, {"consume"})}  # in life, a database


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    if not os.environ.get("SECRET_KEY"):
        log.warning("SECRET_KEY is not set: tokens are good for this process only, until it ends")
    yield  # what follows runs when every endpoint has returned: too late to end one, in time to count
    log.info("%d payloads were still queued", queue.qsize())


app = FastAPI(lifespan=lifespan)
queue: asyncio.PriorityQueue[tuple[int, str]] = asyncio.PriorityQueue()
numbers = itertools.count()  # lowest first, so that a payload that comes back goes to the front
room = asyncio.Semaphore(CAPACITY)  # a payload holds a place until it is sent
turn = asyncio.Lock()  # idle consumers stand in line for it, so that a payload wakes only the first
connections: Counter[str] = Counter()  # by user
failures: Counter[tuple[float, str]] = Counter()  # of logins, by window of time, and name or address
passwords = PasswordHash.recommended()
login = asyncio.Lock()  # one at a time: a hash takes 64 MiB, and a failure has to count before the next try


async def same_origin(websocket: WebSocket) -> None:
    origin, host = websocket.headers.get("origin"), websocket.headers.get("host")  # RFC 6455, section 10.2
    if origin not in (None, f"http://{host}", f"https://{host}", *ALLOWED_ORIGINS):  # scripts send none
        raise WebSocketException(1008, f"a page from {origin} may not connect")  # before accept(): HTTP 403


def check(token: str, needed: SecurityScopes) -> dict[str, Any]:
    """A token's claims. An HTTPException refuses it; FastAPI answers it to a websocket's handshake too."""
    error, reason = "invalid_token", "the token is not valid"
    try:
        claims = jwt.decode(token[:4096], SECRET_KEY, ["HS256"], {"require": ["sub", "exp", "scope"]})
        if set(needed.scopes) <= set(str(claims["scope"]).split()):
            return claims
        error, reason = "insufficient_scope", f"the token does not allow to {needed.scope_str}"
    except jwt.ExpiredSignatureError:
        reason = "the token has expired"
    except jwt.InvalidTokenError:
        pass  # nor is more said: who makes up tokens need not know what was wrong
    challenge = f'Bearer error="{error}", error_description="{reason}"'  # RFC 6750, section 3
    raise HTTPException(401 if error == "invalid_token" else 403, reason, {"WWW-Authenticate": challenge})


async def bearer(connection: HTTPConnection, needed: SecurityScopes) -> dict[str, Any] | None:
    """The claims of a request's or a websocket's token; None where that comes as the first message."""
    match connection.headers.getlist("authorization"), connection.scope.get("subprotocols", []):
        case [header], _ if header.lower().startswith("bearer "):
            return check(header[7:].strip(), needed)
        case [], ["bearer", token]:
            return check(token, needed)
        case [], ["bearer"]:
            return None
    raise HTTPException(401, "a token is needed", {"WWW-Authenticate": "Bearer"})


async def session(websocket: WebSocket, needed: SecurityScopes) -> AsyncIterator[None]:
    """Accept, run the endpoint, and end it when its time is up. A WebSocketException says how to close."""
    claims = await bearer(websocket, needed)
    await websocket.accept("bearer" if "bearer" in websocket.scope["subprotocols"] else None)
    code, reason = 1008, f"no token came within {AUTH_TIMEOUT} s"
    try:
        async with asyncio.timeout(AUTH_TIMEOUT) as timer:
            claims = claims or check((await websocket.receive()).get("text") or "", needed)
            connections[claims["sub"]] += 1
            if connections[claims["sub"]] > MAX_CONNECTIONS:
                raise WebSocketException(1008, f"a user has at most {MAX_CONNECTIONS} connections")
            expiry = int(claims["exp"]) - time.time(), 1008, "the token has expired"
            seconds, code, reason = min(expiry, (MAX_LIFESPAN, 1001, f"{MAX_LIFESPAN} s are over: reconnect"))
            timer.reschedule(asyncio.get_running_loop().time() + seconds)
            yield
    except HTTPException as error:  # too late to be an answer
        raise WebSocketException(1008, error.detail) from None
    except TimeoutError:
        if not timer.expired():
            code, reason = 1001, f"nothing was sent for {IDLE_AFTER} s"
        raise WebSocketException(code, reason) from None
    except asyncio.CancelledError:  # by --timeout-graceful-shutdown; uvicorn would log a traceback
        log.warning("%s was cut off: it does not read", websocket.client)
    finally:
        if claims:
            connections[claims["sub"]] -= 1


@app.exception_handler(WebSocketException)
async def refuse(websocket: WebSocket, refusal: WebSocketException) -> None:
    log.warning("%s closed with %d: %s", websocket.client, refusal.code, refusal.reason)
    with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
        async with asyncio.timeout(FULL_TIMEOUT):  # one that does not read can't be told
            await websocket.close(refusal.code, refusal.reason)


async def put(payload: str | None) -> None:
    """Check and queue a payload; None is a binary frame. A WebSocketException says how to close."""
    if payload is None:
        raise WebSocketException(1003, "a binary frame: send payloads as text")
    if len(payload.encode()) > MAX_PAYLOAD:
        raise WebSocketException(1009, f"a payload has at most {MAX_PAYLOAD} bytes")
    try:
        from_json(payload, allow_inf_nan=False)
        if room.locked():  # only then: a timer for every payload would cost a tenth of the speed
            async with asyncio.timeout(FULL_TIMEOUT):
                await room.acquire()
        else:
            await room.acquire()
    except ValueError as error:
        raise WebSocketException(1007, f"not JSON: {error}") from None
    except TimeoutError:
        raise WebSocketException(1013, "the queue is full: try again later") from None
    queue.put_nowait((next(numbers), payload))


@app.websocket("/ws/producer", dependencies=[Depends(same_origin), Security(session, scopes=["produce"])])
async def producer(websocket: WebSocket) -> None:
    paid, waited = 0.0, 0.0  # a token bucket: the time up to which it has paid, 1 / RATE s for each payload
    while True:
        async with asyncio.timeout(IDLE_AFTER):  # see session()
            message = await websocket.receive()
        if message["type"] != "websocket.receive":
            return
        now = time.monotonic()
        if paid < now - 1:  # the bucket is full: it holds a second
            paid, waited = now - 1, 0.0
        paid += 1 / RATE
        waited += max(0, paid - now)
        if waited > RATE_TIMEOUT:
            raise WebSocketException(1008, f"more than {RATE} payloads a second")
        await asyncio.sleep(paid - now)
        await put(message.get("text"))
        with suppress(WebSocketDisconnect, RuntimeError):  # it left, but what it sent counts
            await websocket.send_text(message["text"])


async def send_payloads(websocket: WebSocket) -> None:
    for sent in itertools.count():
        if sent % BURST and not queue.empty():
            number, payload = queue.get_nowait()
        else:
            async with turn:
                number, payload = await queue.get()
        try:
            await websocket.send_text(payload)
        except (WebSocketDisconnect, RuntimeError, asyncio.CancelledError):
            return queue.put_nowait((number, payload))  # not written: uvicorn waits first, then writes
        room.release()


@app.websocket("/ws/consumer", dependencies=[Depends(same_origin), Security(session, scopes=["consume"])])
async def consumer(websocket: WebSocket) -> None:
    async with asyncio.TaskGroup() as group:
        sender = group.create_task(send_payloads(websocket))
        while (await websocket.receive())["type"] == "websocket.receive":
            pass  # what it says is ignored, but only receive() tells that it left or the server stops
        sender.cancel()


def network(host: str) -> str:
    """What failed logins count for: the address, or of IPv6 the /64, since a client may have all of it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host  # a Unix socket has none
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address), 64), strict=False))


@app.post("/token")
async def token(
    request: Request, response: Response, form: Annotated[OAuth2PasswordRequestForm, Depends()]
) -> dict[str, str | int]:
    """A token for a password. Whether a user exists makes no difference to answers, their time, or limits."""
    password_hash, allowed = USERS.get(form.username, (NOBODY, set()))
    password = form.password.encode(errors="surrogatepass")  # for a form may bring half a pair
    names = f"name {form.username[:99]}", f"address {network(request.client.host if request.client else '')}"
    async with login:
        keys = [(time.monotonic() // LOGIN_WINDOW, name) for name in names]
        if any(failures[key] >= MAX_FAILURES for key in keys):
            raise HTTPException(429, "too many failed logins", {"Retry-After": str(LOGIN_WINDOW)})
        if not await asyncio.to_thread(passwords.verify, password, password_hash):
            if len(failures) > 10_000:  # more hashes than a window has time for, so these are old
                failures.clear()
            failures.update(keys)
            raise HTTPException(401, "wrong user name or password", {"WWW-Authenticate": "Bearer"})
    scope = " ".join(sorted(allowed & set(form.scopes or allowed)))
    claims = {"sub": form.username, "exp": int(time.time()) + TOKEN_LIFESPAN, "scope": scope}
    response.headers["Cache-Control"] = "no-store"
    access = jwt.encode(claims, SECRET_KEY, "HS256")
    return {"access_token": access, "token_type": "bearer", "expires_in": TOKEN_LIFESPAN, "scope": scope}


@app.get("/stats", dependencies=[Depends(bearer)])
async def stats() -> dict[str, int | bool]:
    return {"queued": queue.qsize(), "capacity": CAPACITY, "acks": False}


@app.get("/")
async def index() -> Response:
    page = Path(__file__).parent.parent / "web/index.html"
    if page.exists():
        return FileResponse(page, headers={"Content-Security-Policy": CSP})
    return PlainTextResponse("A queue between websockets: send to /ws/producer, receive from /ws/consumer.")


if __name__ == "__main__":
    # Uvicorn would believe the X-Forwarded-For of whoever connects from 127.0.0.1, and so lets them guess as
    # another address each time. Behind a proxy: proxy_headers=True, forwarded_allow_ips="ITS ADDRESS".
    # Compression would cost 2 to 5 times the CPU, for clients that offer it, as browsers do.
    uvicorn.run(
        app, host="127.0.0.1", port=8000, timeout_graceful_shutdown=1, ws_per_message_deflate=False,
        proxy_headers=False,
    )  # fmt: skip
