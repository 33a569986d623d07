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
import logging
import os
import secrets
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

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
log = logging.getLogger("uvicorn.error")  # uvicorn prints what this logger gets
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
Handler = Callable[[C, WebSocket], Awaitable[Numbered | Error]]


class Router:
    """Handlers by the type of their calls, and the models of what else the server sends."""

    def __init__(self, *others: type[Message]) -> None:
        self.others = others
        self.models: dict[str, type[Call]] = {}
        self.replies: dict[str, list[type[Message]]] = {}
        self.handlers: dict[str, Handler[Any]] = {}

    def on(self, kind: str) -> Callable[[Handler[C]], Handler[C]]:
        """Decorate a handler. Its annotations are the models of the call and of the reply."""

        def decorate(handler: Handler[C]) -> Handler[C]:
            hints = get_type_hints(handler)
            call = hints["call"]
            if call in self.models.values():
                raise ValueError(f"{kind} needs a model of its own: {call.__name__} has a handler")
            reply = hints.get("return")
            # A union, such as Notes | Error, has several models.
            replies = get_args(reply) or (reply,)
            if not all(isinstance(model, type) and issubclass(model, Message) for model in replies):
                raise TypeError(f"the handler of {kind} must return a Message, not {reply}")
            self.models[kind] = call
            # Any call can get an error. The document lists each model once.
            self.replies[kind] = list(dict.fromkeys([*replies, Error]))
            self.handlers[kind] = handler
            return handler

        return decorate


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    with suppress(asyncio.CancelledError):  # raised here if Ctrl+C is pressed twice
        yield


app = FastAPI(title="Boards", lifespan=lifespan)
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


async def handle(text: str, websocket: WebSocket) -> None:
    """Call the handler of a message. Send its reply, or an error."""
    call = parse(text)
    if isinstance(call, Error):
        await websocket.send_text(call.model_dump_json())
        return
    try:
        reply = await messages.handlers[call.type](call, websocket)
        await websocket.send_text(reply.model_dump_json())
    except (Exception, asyncio.CancelledError) as failure:
        # Is this task itself cancelled, or only something that the handler waits for?
        task = asyncio.current_task()
        if task and task.cancelling():
            raise asyncio.CancelledError from failure
        error = Error(id=call.id, reason="the server failed")
        # If the handler has failed because the client has left, this ends the endpoint.
        await websocket.send_text(error.model_dump_json())
        log.exception("call %d failed", call.id)


@app.websocket("/ws", dependencies=[Depends(same_origin), Depends(signed_in)])
async def endpoint(websocket: WebSocket) -> None:
    await websocket.accept()
    # If the client does not read, uvicorn cancels this endpoint when it stops.
    with suppress(*GONE, asyncio.CancelledError):
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            await handle(message.get("text") or "", websocket)


# A generator of types would make a type of each field that has a title.
class NoTitles(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: object) -> bool:
        return False


@app.get("/asyncapi.json")
async def document(request: Request) -> dict[str, Any]:
    """Describe what this server receives, replies and sends, in AsyncAPI 3."""
    keys: list[tuple[type[BaseModel], JsonSchemaMode]]
    keys = [(model, "validation") for model in messages.models.values()]
    for models in (*messages.replies.values(), messages.others):
        keys += [(model, "serialization") for model in models]
    refs, schemas = models_json_schema(
        keys, schema_generator=NoTitles, ref_template="#/components/schemas/{model}"
    )
    # A model that is both received and sent may have two schemas, which have two names.
    names = {key: ref["$ref"].rpartition("/")[2] for key, ref in refs.items()}
    kinds: dict[type[BaseModel], str] = {call: kind for kind, call in messages.models.items()}
    contents: dict[str, Any] = {}
    for model, mode in keys:
        name = names[model, mode]
        contents[name] = {"payload": refs[model, mode]}
        if "id" in model.model_fields:
            contents[name]["correlationId"] = {"location": "$message.payload#/id"}
        if model in kinds:
            schemas["$defs"][name]["properties"]["type"]["const"] = kinds[model]

    def refer(mode: JsonSchemaMode, *models: type[BaseModel]) -> dict[str, Any]:
        path = "#/channels/ws/messages/"
        found = [{"$ref": path + names[model, mode]} for model in models]
        return {"channel": {"$ref": "#/channels/ws"}, "messages": found}

    operations: dict[str, Any] = {}
    for kind, call in messages.models.items():
        operations[kind] = {"action": "receive", **refer("validation", call)}
        operations[kind]["reply"] = refer("serialization", *messages.replies[kind])
        operations[kind]["summary"] = messages.handlers[kind].__doc__ or ""
    for model in messages.others:
        name = names[model, "serialization"]
        operations[name] = {"action": "send", **refer("serialization", model)}
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
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": "frame-ancestors 'none'"})


if COMPONENT == "/component":
    app.mount(COMPONENT, StaticFiles(directory=LOCAL))

if __name__ == "__main__":
    # Raise the limit, or a client with large cookies gets no answer. Compression costs much CPU.
    os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", "1000000")
    options = ["--timeout-graceful-shutdown=1", "--ws-per-message-deflate=false", *sys.argv[1:]]
    uvicorn.main(["__main__:app", *options])
