# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "pydantic>=2.9", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Messages with types: each has a Pydantic model, and each type of call has a handler.

It differs from server.py in that clients send calls, and a reply has the `id` of its call. A
handler can subscribe its client to a topic, and server code can push messages to a topic. Run
`python lessons/typed_server.py`, and in another terminal `python tests/examples/typed_client.py`
with a message in quotes. A call is handled at most once, and a push arrives at most once.
"""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import uvicorn
from fastapi import Body, Depends, FastAPI, WebSocket, WebSocketDisconnect
from fastapi.exceptions import HTTPException, RequestValidationError, WebSocketException
from fastapi.requests import HTTPConnection, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

MAX_MESSAGE = 1024 * 1024  # bytes of UTF-8
OUTBOX = 1000  # messages that wait to be sent to a client
TIMEOUT = 1  # seconds to wait for a close frame to be sent
HANDLER_TIMEOUT = 5  # seconds
GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left
log = logging.getLogger("uvicorn.error")  # uvicorn prints what this logger gets
Board = Literal["news", "jobs"]


class Numbered(BaseModel):
    id: int = Field(strict=True, ge=0, lt=2**53)  # JavaScript has no larger exact integers


class Call(Numbered):
    type: str


class Watch(Call):
    board: Board


class Post(Watch):
    text: str = Field(min_length=1, max_length=1000)


class Watchers(Numbered):
    type: Literal["watchers"] = "watchers"
    count: int


class Note(BaseModel):
    type: Literal["note"] = "note"
    board: Board
    author: str
    text: str


class Error(BaseModel):
    type: Literal["error"] = "error"
    id: int | None = None  # of the call, if it could be read
    reason: str
    details: list[dict[str, Any]] = []


C = TypeVar("C", bound=Call)
Handler = Callable[[C, "Client"], Awaitable[BaseModel | None]]


class Router:
    """Handlers by the type of their calls, as an APIRouter has endpoints by path."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.models: dict[str, type[Call]] = {}
        self.handlers: dict[str, Handler[Any]] = {}

    def on(self, kind: str) -> Callable[[Handler[C]], Handler[C]]:
        """Decorate a handler. The annotation of its parameter `call` is the model of the call."""
        kind = self.prefix + kind
        if kind in self.handlers:
            raise ValueError(f"{kind} has a handler already")

        def decorate(handler: Handler[C]) -> Handler[C]:
            self.models[kind] = get_type_hints(handler)["call"]
            self.handlers[kind] = handler
            return handler

        return decorate

    def include(self, router: "Router") -> None:
        for kind, handler in router.handlers.items():
            self.on(kind)(handler)


class Client:
    def __init__(self, websocket: WebSocket) -> None:
        host, port = websocket.client or ("unknown", 0)
        self.name = f"{host}:{port}"
        self.topics: set[str] = set()
        self.outbox: asyncio.Queue[str] = asyncio.Queue(OUTBOX)
        self.endpoint = asyncio.current_task()
        self.refusal: WebSocketException | None = None

    def disconnect(self, code: int, reason: str) -> None:
        """End the endpoint, even if it waits for a client that does not read."""
        self.refusal = WebSocketException(code, reason)
        clients.discard(self)
        if self.endpoint:
            self.endpoint.cancel()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    with suppress(asyncio.CancelledError):  # raised here if Ctrl+C is pressed twice
        yield


app = FastAPI(lifespan=lifespan)
messages = Router()
clients: set[Client] = set()


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


def push(topic: str, message: BaseModel) -> int:
    """Send a message to the subscribers of a topic, without waiting. Return how many there are."""
    text = message.model_dump_json()
    subscribers = [client for client in clients if topic in client.topics]
    for client in subscribers:
        try:
            client.outbox.put_nowait(text)
        except asyncio.QueueFull:
            client.disconnect(1013, "you read too slowly: connect again")
    return len(subscribers)


@messages.on("watch")
async def watch(call: Watch, client: Client) -> Watchers:
    client.topics.add(call.board)
    return Watchers(id=call.id, count=sum(call.board in other.topics for other in clients))


@messages.on("post")
async def post(call: Post, client: Client) -> Watchers:
    note = Note(board=call.board, author=client.name, text=call.text)
    return Watchers(id=call.id, count=push(call.board, note))


async def same_origin(connection: HTTPConnection) -> None:
    """Refuse web pages from other sites. Browsers send an Origin header, scripts do not."""
    origin = connection.headers.get("origin")
    host = connection.headers.get("host")
    if origin not in (None, f"http://{host}", f"https://{host}"):
        reason = f"a page from {origin} may not connect to {host}: open the page at that address"
        if connection.scope["type"] == "http":
            raise HTTPException(403, reason)
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


def parse(text: str) -> Call | Error:
    """Read a message with the model of its type, or say what is wrong with it."""
    error = Error(reason="not a valid call")
    try:
        error.id = Numbered.model_validate_json(text).id
        kind = Call.model_validate_json(text).type
        if kind in messages.models:
            return messages.models[kind].model_validate_json(text)
        error.details = [{"loc": ["type"], "msg": f"not one of {', '.join(messages.models)}"}]
    except ValidationError as problem:
        error.details = [{"loc": e["loc"], "msg": e["msg"][:200]} for e in problem.errors()]
    except Exception:
        log.exception("a validator failed on call %s", error.id)
        error.reason = "the server failed"
    return error


async def handle(text: str | None, client: Client) -> str | None:
    """Call the handler of a message. Return the JSON of its reply, or of an error."""
    if text is None:
        return Error(reason="a binary frame: send messages as text").model_dump_json()
    call = parse(text)
    if isinstance(call, Error):
        return call.model_dump_json()
    try:
        async with asyncio.timeout(HANDLER_TIMEOUT):
            reply = await messages.handlers[call.type](call, client)
        return None if reply is None else reply.model_dump_json()
    except (Exception, asyncio.CancelledError) as failure:
        # Is this task itself cancelled, or only something that the handler waits for?
        task = asyncio.current_task()
        if task and task.cancelling():
            raise asyncio.CancelledError from failure
        log.exception("call %d of %s failed", call.id, client.name)
        return Error(id=call.id, reason="the server failed").model_dump_json()


async def send_messages(websocket: WebSocket, client: Client) -> None:
    with suppress(*GONE):
        while True:
            await websocket.send_text(await client.outbox.get())
    # The client has left. Its last calls are still handled, and nobody gets the replies.
    while True:
        await client.outbox.get()


@app.websocket("/ws", dependencies=[Depends(same_origin)])
async def endpoint(websocket: WebSocket) -> None:
    await websocket.accept()
    client = Client(websocket)
    clients.add(client)
    try:
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(send_messages(websocket, client))
            while (message := await websocket.receive())["type"] != "websocket.disconnect":
                text = message.get("text")
                if text is not None and len(text.encode()) > MAX_MESSAGE:
                    client.disconnect(1009, f"a message has at most {MAX_MESSAGE} bytes")
                elif reply := await handle(text, client):
                    await client.outbox.put(reply)
                # If there are more calls, nothing above pauses: let the senders run.
                await asyncio.sleep(0)
            sender.cancel()
    except asyncio.CancelledError:
        # If the client does not read, disconnect() or uvicorn cancels this endpoint.
        pass
    finally:
        clients.discard(client)
    if client.refusal:
        raise client.refusal


@app.post("/boards/{board}", dependencies=[Depends(same_origin)])
async def post_by_http(
    board: Board, text: Annotated[str, Body(embed=True, min_length=1, max_length=1000)]
) -> dict[str, int]:
    return {"watchers": push(board, Note(board=board, author="the server", text=text))}


if __name__ == "__main__":
    # Raise the limit, or a client with large cookies gets no answer. Compression costs much CPU.
    os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", "1000000")
    options = ["--timeout-graceful-shutdown=1", "--ws-per-message-deflate=false", *sys.argv[1:]]
    uvicorn.main(["__main__:app", *options])
