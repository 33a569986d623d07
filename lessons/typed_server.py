# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "pydantic>=2.9", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Messages with types: Pydantic models, handlers by model, and AsyncAPI documentation made from both.

Run `python lessons/typed_server.py`, and open http://127.0.0.1:8000/asyncapi. server.py takes any JSON; here
a client's call has a type, and its `id` comes back with the reply, or with an `error`. Clients post notes on
boards, and these are pushed to all who watch. At most once: who is away, or reads too slowly, misses them.
"""

import asyncio
import functools
import logging
import operator
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import uvicorn
from fastapi import Depends, FastAPI, Header, Request, WebSocket, WebSocketDisconnect, WebSocketException
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field, RootModel, ValidationError, create_model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

MAX_MESSAGE = 1024 * 1024  # bytes of UTF-8
OUTBOX = 1000  # messages that wait to be written to a client; with one more it is too slow
HANDLER_TIMEOUT = 5  # seconds
SEND_TIMEOUT = 40  # seconds for which a socket may be full, as long as uvicorn waits for an answer to a ping
TOKEN = os.environ.get("TOKEN")  # where it is set, clients bring it: Authorization: Bearer TOKEN
LOCAL = os.environ.get("ASYNCAPI_COMPONENT")  # a folder with the files that else come from the CDN
COMPONENT = "/component" if LOCAL else "https://cdn.jsdelivr.net/npm/@asyncapi/react-component@3.2.1"
PAGE = f"""<!doctype html><meta charset="utf-8"><title>AsyncAPI</title><link rel="icon" href="data:,"><body>
<link rel="stylesheet" href="{COMPONENT}/styles/default.min.css" crossorigin
  integrity="sha384-oo9RoQcacP++XdMX6CjTucTvASEORHX3chFik0/V2kHcsHiVboGyWZztGeq/0bum">
<script src="{COMPONENT}/browser/standalone/index.js" crossorigin
  integrity="sha384-wy5bSOazlkSKMGH7XMW6+pK8ho8+rCPr7mTqKdAb/dvfwXAPWCFivgr3C7wJMFAh"></script>
<script>AsyncApiStandalone.render({{schema: {{url: "asyncapi.json"}}}}, document.body)</script>
"""
log = logging.getLogger("uvicorn.error")  # the one that uvicorn shows, at INFO and above

Board = Literal["news", "jobs"]


class Message(BaseModel, json_schema_serialization_defaults_required=True):
    """What is sent always has its `type`, and the documentation says so."""


class Numbered(Message):
    id: int = Field(strict=True, ge=0, lt=2**53)  # JavaScript's whole numbers


class Watch(Numbered):
    type: Literal["watch"]
    board: Board


class Post(Numbered):
    type: Literal["post"]
    board: Board
    text: str = Field(min_length=1, max_length=1000)


class Watchers(Numbered):
    type: Literal["watchers"] = "watchers"
    count: int


class Note(Message):
    type: Literal["note"] = "note"
    board: Board
    author: str
    text: str


class Detail(BaseModel):
    loc: list[str | int]
    msg: str


class Error(Message):
    type: Literal["error"] = "error"
    id: int | None = None  # None where it could not be read
    reason: str
    details: list[Detail] = []


class Connection:
    """A client: who it is, which boards it watches, and what is to be written to it."""

    def __init__(self, caller: str) -> None:
        self.caller, self.boards = caller, set[Board]()
        self.outbox: asyncio.Queue[str] = asyncio.Queue(OUTBOX)
        self.patience = asyncio.timeout(None)  # around all that its endpoint does; push() lets it run out


Call = TypeVar("Call", bound=Numbered)
Handler = Callable[[Call, Connection], Awaitable[Numbered]]


class Router:
    """Handlers by the model of their call, as an APIRouter has them by path; and what they push."""

    def __init__(self, *pushes: type[Message]) -> None:
        self.handlers: dict[type[Numbered], Handler[Any]] = {}
        self.pushes = pushes

    def on(self, call: type[Call]) -> Callable[[Handler[Call]], Handler[Call]]:
        """Decorate a handler. What it is annotated to return is the model of the reply."""

        def register(handler: Handler[Call]) -> Handler[Call]:
            self.handlers[call] = handler
            return handler

        return register

    def include(self, router: "Router") -> None:
        self.handlers |= router.handlers
        self.pushes += router.pushes

    @functools.cached_property
    def union(self) -> type[RootModel[Any]]:
        """The model of any call, told by its `type`; made at the first, when all handlers are there."""
        calls: Any = functools.reduce(operator.or_, self.handlers)
        by_type = Field(discriminator="type" if len(self.handlers) > 1 else None)
        return create_model("AnyCall", __base__=RootModel[Any], root=(calls, by_type))


app = FastAPI(title="Boards")
messages = Router(Note, Error)
connections: set[Connection] = set()


def push(message: Message, receivers: Iterable[Connection]) -> None:
    """Send what answers no call. Nobody waits for a receiver that has no room: it is disconnected."""
    text = message.model_dump_json()
    for connection in connections.intersection(receivers):
        try:
            connection.outbox.put_nowait(text)
        except asyncio.QueueFull:
            connections.discard(connection)
            connection.patience.reschedule(0)


def watchers(board: Board) -> list[Connection]:
    return [connection for connection in connections if board in connection.boards]


@messages.on(Watch)
async def watch(call: Watch, connection: Connection) -> Watchers:
    """Get the notes of a board from now on."""
    connection.boards.add(call.board)
    return Watchers(id=call.id, count=len(watchers(call.board)))


@messages.on(Post)
async def post(call: Post, connection: Connection) -> Watchers:
    """Show a note to all who watch a board."""
    receivers = watchers(call.board)
    push(Note(board=call.board, author=connection.caller, text=call.text), receivers)
    return Watchers(id=call.id, count=len(receivers))


async def same_origin(websocket: WebSocket) -> None:
    origin, host = websocket.headers.get("origin"), websocket.headers.get("host")  # RFC 6455, section 10.2
    if origin not in (None, f"http://{host}", f"https://{host}"):  # browsers always send it, scripts do not
        log.warning("a page from %s may not connect to %s: open the page at that address", origin, host)
        raise WebSocketException(1008)  # before accept(), so the client sees HTTP 403


async def signed_in(websocket: WebSocket, authorization: Annotated[str, Header()] = "") -> str:
    if TOKEN and not secrets.compare_digest(authorization.encode(), f"Bearer {TOKEN}".encode()):
        raise WebSocketException(1008)
    return f"{websocket.client.host}:{websocket.client.port}" if websocket.client else "somebody"


async def answer(text: str | None, connection: Connection) -> Message:
    """The reply to what came; None is a binary frame."""
    if text is None:
        return Error(reason="a binary frame: send messages as text")
    if len(text.encode()) > MAX_MESSAGE:
        raise WebSocketException(1009, f"a message has at most {MAX_MESSAGE} bytes")
    try:
        call = messages.union.model_validate_json(text).root
    except ValidationError as error:
        details = [Detail(loc=list(e["loc"]), msg=e["msg"][:200]) for e in error.errors()]
        number = None
        with suppress(ValidationError):
            number = Numbered.model_validate_json(text).id
        return Error(id=number, reason="not a valid call", details=details)
    try:
        async with asyncio.timeout(HANDLER_TIMEOUT):
            return await messages.handlers[type(call)](call, connection)
    except Exception:
        log.exception("call %d of %s failed", call.id, connection.caller)
        return Error(id=call.id, reason="the server failed")


async def send_messages(websocket: WebSocket, outbox: asyncio.Queue[str]) -> None:
    while True:
        text = await outbox.get()
        async with asyncio.timeout(SEND_TIMEOUT):
            await websocket.send_text(text)


@app.websocket("/ws", dependencies=[Depends(same_origin)])
async def endpoint(websocket: WebSocket, caller: Annotated[str, Depends(signed_in)]) -> None:
    await websocket.accept()
    connections.add(connection := Connection(caller))
    refusal = None
    try:
        async with connection.patience, asyncio.TaskGroup() as group:
            sender = group.create_task(send_messages(websocket, connection.outbox))
            while (frame := await websocket.receive())["type"] == "websocket.receive":
                reply = await answer(frame.get("text"), connection)
                await connection.outbox.put(reply.model_dump_json())  # waits: who does not read is not read
                await asyncio.sleep(0)  # else many calls that came together fill outboxes before one is read
            sender.cancel()
    except* WebSocketException as refusals:
        refusal = refusals.exceptions[0]
    except* TimeoutError:  # needs Python 3.11
        refusal = WebSocketException(1013, "you read too slowly: connect again")
    except* (WebSocketDisconnect, RuntimeError):
        pass  # it left while it was sent something
    except* asyncio.CancelledError:  # by --timeout-graceful-shutdown; uvicorn would log a traceback
        log.warning("client %s was cut off: it does not read, or its call takes long", caller)
    finally:
        connections.discard(connection)
    if isinstance(refusal, WebSocketException):
        log.warning("client %s closed with %d: %s", caller, refusal.code, refusal.reason)
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
            async with asyncio.timeout(1):  # for who reads nothing hears nothing
                await websocket.close(refusal.code, refusal.reason)


class NoTitles(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: object) -> bool:
        return False  # else a generator of types makes each field's title the name of a type


@app.get("/asyncapi.json")
async def document(request: Request) -> dict[str, Any]:
    """AsyncAPI 3: what this server receives, and replies, and what it sends unasked."""
    replies = {call: get_type_hints(handler)["return"] for call, handler in messages.handlers.items()}
    models: list[tuple[type[Message], JsonSchemaMode]] = [(call, "validation") for call in replies]
    models += [(model, "serialization") for model in (*replies.values(), *messages.pushes)]
    payloads, schemas = models_json_schema(
        models, schema_generator=NoTitles, ref_template="#/components/schemas/{model}"
    )
    names = {model: payload["$ref"].split("/")[-1] for (model, _), payload in payloads.items()}
    channel = {"$ref": "#/channels/ws"}
    contents: dict[str, Any] = {names[model]: {"payload": payloads[model, mode]} for model, mode in payloads}
    operations: dict[str, Any] = {}

    def add(action: str, model: type[Message], **more: object) -> None:
        operations[names[model]] = {"action": action, "channel": channel, "messages": refer(model), **more}

    def refer(*models: type[Message]) -> list[dict[str, str]]:
        return [{"$ref": f"#/channels/ws/messages/{names[model]}"} for model in models]

    for call, reply in replies.items():
        summary, answers = messages.handlers[call].__doc__ or "", refer(reply, Error)
        add("receive", call, summary=summary, reply={"channel": channel, "messages": answers})
    for model in messages.pushes:
        add("send", model)
    for model in (*replies, *replies.values(), Error):
        contents[names[model]]["correlationId"] = {"location": "$message.payload#/id"}
    protocol = "wss" if request.url.scheme == "https" else "ws"
    security = [{"type": "http", "scheme": "bearer"}] if TOKEN else []
    return {
        "asyncapi": "3.0.0",
        "info": {"title": app.title, "version": app.version},
        "servers": {"this": {"host": request.url.netloc, "protocol": protocol, "security": security}},
        "channels": {"ws": {"address": "/ws", "messages": contents}},
        "operations": operations,
        "components": {"schemas": schemas["$defs"]},
    }


@app.get("/asyncapi")
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE)


if LOCAL:
    app.mount("/component", StaticFiles(directory=LOCAL))

if __name__ == "__main__":
    # Compression would cost 2 to 5 times the CPU, for clients that offer it, as browsers do.
    uvicorn.run(app, host="127.0.0.1", port=8000, timeout_graceful_shutdown=1, ws_per_message_deflate=False)
