"""What the pages say about using server.py and rooms_server.py in an app of your own."""

import asyncio
from contextlib import suppress

import pytest
from websockets.asyncio.client import connect

import server
from lessons import rooms_server
from tests.examples import in_app, rooms
from tests.kit.clients import CONNECTING, receive
from tests.kit.commands import uvicorn_command
from tests.kit.servers import running, tracebacks
from tests.kit.waiting import until


async def test_server_can_be_mounted_in_another_app() -> None:
    """A payload goes through it, bad input is refused, and its own /stats is below the path, too."""
    with running(uvicorn_command("tests.examples.mount:app")) as server:
        options = {**CONNECTING}
        async with (
            connect(server.url("/queue/ws/producer"), **options) as producer,  # type: ignore[arg-type]
            connect(server.url("/queue/ws/consumer"), **options) as consumer,  # type: ignore[arg-type]
        ):
            await producer.send("1")
            assert await receive(producer) == "1"
            assert await receive(consumer) == "1"
            await producer.send("nonsense")
            await producer.wait_closed()
            assert producer.close_code == 1007
        assert server.get("/queue/stats")[0] == 200
        server.interrupt()
        assert server.ends_within(2) is not None
        assert "0 payloads were still queued" in server.log
        assert tracebacks(server.log) == 0


async def test_an_app_can_produce_and_consume_in_the_server() -> None:
    """Its task consumes what its other task produces, and what a client sends. Ctrl+C ends both tasks."""
    with running(uvicorn_command("tests.examples.in_app:app")) as server:
        await until(lambda: 'saved {"temperature": 20}' in server.log, "a measurement")
        options = {**CONNECTING}
        async with connect(server.url("/queue/ws/producer"), **options) as producer:  # type: ignore[arg-type]
            await producer.send('"from a client"')
            assert await receive(producer) == '"from a client"'
        await until(lambda: 'saved "from a client"' in server.log, "the client's payload")
        server.interrupt()
        assert server.ends_within(2) is not None
        assert tracebacks(server.log) == 0


async def test_an_app_that_fails_to_save_a_payload_gets_it_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its task goes on, and the next payloads come after it."""
    saved: list[str] = []

    async def save(payload: str) -> None:
        if not caplog.records:
            raise OSError("the disk is full")
        saved.append(payload)

    monkeypatch.setattr(in_app, "save", save)
    consuming = asyncio.create_task(in_app.consume())
    await server.channel.put("1")
    await server.channel.put("2")
    await until(lambda: saved == ["1", "2"], "both")
    assert caplog.messages == ["a payload went back to the queue"]
    consuming.cancel()
    with suppress(asyncio.CancelledError):
        await consuming


async def test_a_payload_that_a_task_was_working_on_counts_as_still_queued(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    working = asyncio.Event()

    async def answer(payload: str) -> None:
        working.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(rooms, "answer", answer)
    caplog.set_level("INFO", "uvicorn.error")
    async with rooms.lifespan(rooms.app):
        await rooms_server.rooms["questions"].put("1")
        await working.wait()
    assert caplog.messages == ["1 payloads were still queued"]
    rooms_server.rooms.clear()
