"""asyncapi_server.py with handlers from another file, some of which go wrong, for the tests."""

import asyncio
import logging
import os
from typing import Literal

from fastapi import WebSocket
from pydantic import field_validator

from lessons.asyncapi_server import Call, Error, Message, Numbered, app, messages

__all__ = ["app"]


class Echo(Call):
    text: str


class Echoed(Numbered):
    type: Literal["echoed"] = "echoed"
    text: str


@messages.on("echo")
async def echo(call: Echo, websocket: WebSocket) -> Echoed:
    """Say it again."""
    return Echoed(id=call.id, text=call.text)


class Draft(Call):
    """A call with a default, which the server also sends: in a reply, and by itself."""

    text: str = ""


class Drafted(Numbered):
    type: Literal["drafted"] = "drafted"
    draft: Draft


class Archive:
    class Draft(Message):
        """Another model of the same name."""

        type: Literal["archived"] = "archived"
        year: int


messages.others += (Draft, Archive.Draft)


@messages.on("draft")
async def draft(call: Draft, websocket: WebSocket) -> Drafted | Error:
    """Keep it."""
    return Drafted(id=call.id, draft=call)


class Fail(Call):
    how: Literal["file", "wait", "runtime", "validation"]


@messages.on("fail")
async def fail(call: Fail, websocket: WebSocket) -> Echoed:
    """Go wrong."""
    if call.how == "wait":
        task = asyncio.create_task(asyncio.Event().wait())
        task.cancel()
        await task
    if call.how == "runtime":
        raise RuntimeError("a handler's mistake")
    if call.how == "validation":
        Draft.model_validate({})
    return Echoed(id=call.id, text=os.fsdecode(b"\xff.txt"))


class Pick(Call):
    text: str

    @field_validator("text")
    @classmethod
    def look_up(cls, text: str) -> str:
        """Find only the text `known`."""
        return {"known": text}[text]


@messages.on("pick")
async def pick(call: Pick, websocket: WebSocket) -> Echoed:
    """Say it again, if it is known."""
    return Echoed(id=call.id, text=call.text)


class Flood(Call):
    pass


@messages.on("flood")
async def flood(call: Flood, websocket: WebSocket) -> Echoed:
    """Send until the client leaves."""
    try:
        while True:
            await websocket.send_text("x")
            await asyncio.sleep(0)
    finally:
        logging.getLogger("uvicorn.error").info("the flood is over")
