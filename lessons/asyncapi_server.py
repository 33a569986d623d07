# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "pydantic>=2.9", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""AsyncAPI documentation for typed messages: what /docs is for HTTP routes.

It differs from typed_server.py in that it makes a document from the models and the handlers. To
stay short, it has fewer messages, and leaves out what does not belong to the document. Run
`python lessons/asyncapi_server.py`, and open http://127.0.0.1:8000/asyncapi. The server keeps the
last 100 notes of each board, until it stops.
"""

import asyncio
import os
import secrets
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import uvicorn
from fastapi import Depends, FastAPI, Header, Request, WebSocket, WebSocketDisconnect
from fastapi.exceptions import WebSocketException
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left
TOKEN = os.environ.get("TOKEN")  # if it is set, clients need `Authorization: Bearer TOKEN`
MODULES = Path(__file__).parent.parent / "tests/typescript/node_modules"
LOCAL = Path(os.environ.get("ASYNCAPI_COMPONENT", MODULES / "@asyncapi/react-component"))
CDN = "https://cdn.jsdelivr.net/npm/@asyncapi/react-component@3.2.1"
COMPONENT = "/component" if (LOCAL / "browser/standalone/index.js").exists() else CDN
PAGE = f"""<!doctype html><html lang="en"><head>
<meta charset="utf-8"><title>AsyncAPI</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{COMPONENT}/styles/default.min.css" crossorigin
  integrity="sha384-oo9RoQcacP++XdMX6CjTucTvASEORHX3chFik0/V2kHcsHiVboGyWZztGeq/0bum">
</head><body>
<div id="asyncapi">AsyncAPI's React component is missing, and has not come from {COMPONENT}.
To install it, run <code>npm ci --prefix tests/typescript</code>. Then restart the server.</div>
<script src="{COMPONENT}/browser/standalone/index.js" crossorigin
  integrity="sha384-wy5bSOazlkSKMGH7XMW6+pK8ho8+rCPr7mTqKdAb/dvfwXAPWCFivgr3C7wJMFAh"></script>
<script>const target = document.getElementById("asyncapi");
window.AsyncApiStandalone?.render({{schema: {{url: "asyncapi.json"}}}}, target);</script>
"""
Board = Literal["news", "jobs"]


# Without this setting, the document would call each field with a default optional.
class Message(BaseModel, json_schema_serialization_defaults_required=True):
    pass


class Numbered(Message):
    id: int = Field(strict=True, ge=0, lt=2**53)  # JavaScript has no larger exact integers


class Call(Numbered):
    type: str


class Read(Call):
    board: Board


class Post(Read):
    text: str = Field(min_length=1, max_length=1000)


class Notes(Numbered):
    type: Literal["notes"] = "notes"
    count: int


class Note(Message):
    type: Literal["note"] = "note"
    board: Board
    text: str


class Error(Message):
    type: Literal["error"] = "error"
    id: int | None = None  # of the call, if it could be read
    reason: str
    details: list[dict[str, Any]] = []


C = TypeVar("C", bound=Call)
Handler = Callable[[C, WebSocket], Awaitable[Numbered]]


class Router:
    """Handlers by the type of their calls, and the models of what else the server sends."""

    def __init__(self, *others: type[Message]) -> None:
        self.others = others
        self.handlers: dict[str, Handler[Any]] = {}

    def on(self, kind: str) -> Callable[[Handler[C]], Handler[C]]:
        """Decorate a handler. Its annotations are the models of the call and of the reply."""

        def decorate(handler: Handler[C]) -> Handler[C]:
            self.handlers[kind] = handler
            return handler

        return decorate


app = FastAPI(title="Boards")
messages = Router(Note, Error)
boards: dict[Board, deque[Note]] = {"news": deque(maxlen=100), "jobs": deque(maxlen=100)}


@messages.on("read")
async def read(call: Read, websocket: WebSocket) -> Notes:
    """Send the notes of a board, and then their number."""
    for note in list(boards[call.board]):
        await websocket.send_text(note.model_dump_json())
    return Notes(id=call.id, count=len(boards[call.board]))


@messages.on("post")
async def post(call: Post, websocket: WebSocket) -> Notes:
    """Put a note on a board."""
    boards[call.board].append(Note(board=call.board, text=call.text))
    return Notes(id=call.id, count=len(boards[call.board]))


async def same_origin(websocket: WebSocket) -> None:
    """Refuse web pages from other sites. Browsers send an Origin header, scripts do not."""
    origin = websocket.headers.get("origin")
    host = websocket.headers.get("host")
    if origin not in (None, f"http://{host}", f"https://{host}"):
        reason = f"a page from {origin} may not connect to {host}: open the page at that address"
        raise WebSocketException(1008, reason)


async def signed_in(authorization: Annotated[str, Header()] = "") -> None:
    """Refuse clients without the token, if there is one."""
    if TOKEN and not secrets.compare_digest(authorization.encode(), f"Bearer {TOKEN}".encode()):
        raise WebSocketException(1008, "the token is missing or wrong")


async def handle(text: str, websocket: WebSocket) -> Message:
    """Call the handler of a message. Return its reply, or an error."""
    error = Error(reason="not a valid call")
    try:
        error.id = Numbered.model_validate_json(text).id
        handler = messages.handlers.get(Call.model_validate_json(text).type)
        if handler:
            call = get_type_hints(handler)["call"].model_validate_json(text)
            return await handler(call, websocket)
        known = ", ".join(messages.handlers)
        error.details = [{"loc": ["type"], "msg": f"not one of {known}"}]
    except ValidationError as problem:
        error.details = [{"loc": e["loc"], "msg": e["msg"]} for e in problem.errors()]
    return error


@app.websocket("/ws", dependencies=[Depends(same_origin), Depends(signed_in)])
async def endpoint(websocket: WebSocket) -> None:
    await websocket.accept()
    # If the client does not read, uvicorn cancels this endpoint when it stops.
    with suppress(*GONE, asyncio.CancelledError):
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            reply = await handle(message.get("text") or "", websocket)
            await websocket.send_text(reply.model_dump_json())


# A generator of types would make a type of each field that has a title.
class NoTitles(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: object) -> bool:
        return False


@app.get("/asyncapi.json")
async def document(request: Request) -> dict[str, Any]:
    """Describe what this server receives, replies and sends, in AsyncAPI 3."""
    hints = {kind: get_type_hints(handler) for kind, handler in messages.handlers.items()}
    replies = {hint["return"]: None for hint in hints.values()}
    models: list[tuple[type[BaseModel], JsonSchemaMode]]
    models = [(hint["call"], "validation") for hint in hints.values()]
    models += [(model, "serialization") for model in (*replies, *messages.others)]
    _, schemas = models_json_schema(
        models, schema_generator=NoTitles, ref_template="#/components/schemas/{model}"
    )
    for kind, hint in hints.items():
        schemas["$defs"][hint["call"].__name__]["properties"]["type"]["const"] = kind
    contents: dict[str, Any] = {}
    for model, _ in models:
        payload = {"$ref": f"#/components/schemas/{model.__name__}"}
        contents[model.__name__] = {"payload": payload}
        if "id" in model.model_fields:
            contents[model.__name__]["correlationId"] = {"location": "$message.payload#/id"}
    channel = {"$ref": "#/channels/ws"}

    def refer(*models: type[BaseModel]) -> dict[str, Any]:
        path = "#/channels/ws/messages/"
        return {"channel": channel, "messages": [{"$ref": path + m.__name__} for m in models]}

    operations: dict[str, Any] = {}
    for kind, hint in hints.items():
        operations[kind] = {"action": "receive", **refer(hint["call"])}
        operations[kind]["reply"] = refer(hint["return"], Error)
        operations[kind]["summary"] = messages.handlers[kind].__doc__ or ""
    for model in messages.others:
        operations[model.__name__] = {"action": "send", **refer(model)}
    protocol = "wss" if request.url.scheme == "https" else "ws"
    security = [{"type": "http", "scheme": "bearer"}] if TOKEN else []
    server = {"host": request.url.netloc, "protocol": protocol, "security": security}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": app.title, "version": app.version},
        "servers": {"this": server},
        "channels": {"ws": {"address": "/ws", "messages": contents}},
        "operations": operations,
        "components": {"schemas": schemas["$defs"]},
    }


@app.get("/asyncapi")
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE)


if COMPONENT == "/component":
    app.mount(COMPONENT, StaticFiles(directory=LOCAL))

if __name__ == "__main__":
    # Raise the limit, or a client with large cookies gets no answer. Compression costs much CPU.
    os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", "1000000")
    options = ["--timeout-graceful-shutdown=1", "--ws-per-message-deflate=false", *sys.argv[1:]]
    uvicorn.main(["__main__:app", *options])
