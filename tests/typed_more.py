"""typed_server.py with a router from another file: handlers that go wrong, for the tests."""

import asyncio
import os
from typing import Literal

from pydantic import field_validator

from lessons import typed_server
from lessons.typed_server import Call, Client, Note, Numbered, Router, app
from tests.examples import typed_ask

typed_server.HANDLER_TIMEOUT = int(os.environ.get("HANDLER_TIMEOUT", "1"))
typed_ask.ANSWER_TIMEOUT = float(os.environ.get("ANSWER_TIMEOUT", "1"))
messages = Router()
UNSERIALIZABLE = os.fsdecode(b"\xff.txt")  # the name of a file, and not UTF-8
__all__ = ["app"]


class Echo(Call):
    text: str


class Picky(Call):
    text: str

    @field_validator("text")
    @classmethod
    def look_up(cls, text: str) -> str:
        """Find only the text `known`."""
        return {"known": text}[text]


class Echoed(Numbered):
    type: Literal["echoed"] = "echoed"
    text: str


@messages.on("echo")
async def echo(call: Echo, client: Client) -> Echoed:
    return Echoed(id=call.id, text=call.text)


@messages.on("fail")
async def fail(call: Call, client: Client) -> Echoed:
    raise ValueError("a handler's mistake")


@messages.on("sleep")
async def sleep(call: Call, client: Client) -> Echoed:
    await asyncio.Event().wait()
    return Echoed(id=call.id, text="never")


@messages.on("ask")
async def ask(call: Call, client: Client) -> Echoed:
    """Ask the client that waits for this very handler."""
    await typed_ask.ask(client, "does this work?")
    return Echoed(id=call.id, text="never")


@messages.on("list")
async def list_files(call: Call, client: Client) -> Echoed:
    return Echoed(id=call.id, text=UNSERIALIZABLE)


@messages.on("tell")
async def tell(call: Call, client: Client) -> Echoed:
    """Push a message that cannot be serialized."""
    typed_server.push("news", Note(board="news", author="tell", text=UNSERIALIZABLE))
    return Echoed(id=call.id, text="never")


@messages.on("wait")
async def wait(call: Call, client: Client) -> Echoed:
    """Wait for a task that somebody else has cancelled."""
    task = asyncio.create_task(asyncio.Event().wait())
    task.cancel()
    await task
    return Echoed(id=call.id, text="never")


@messages.on("leave")
async def leave(call: Call, client: Client) -> Echoed:
    """Fail after the client has been cut off, as it may be by a push of its own."""
    client.disconnect(1013, "enough")
    raise ValueError("a handler's mistake")


@messages.on("pick")
async def pick(call: Picky, client: Client) -> Echoed:
    return Echoed(id=call.id, text=call.text)


typed_server.messages.include(messages)
