"""Serve the page with any step, to watch the step in the browser.

Run `uvicorn steps.with_page:step0`, and open http://127.0.0.1:8000. The names step0 to step7 are
the apps of the files in this folder. Each gets two more routes, as in server.py: the page, and
/stats, which tells the page how many payloads are queued.
"""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse

from steps import step0_naive as naive
from steps import step1_keep_receiving as keep_receiving
from steps import step2_pass_text_on as pass_text_on
from steps import step3_put_back as put_back
from steps import step4_validate as validate
from steps import step5_backpressure as backpressure
from steps import step6_take_turns as take_turns
from steps import step7_same_origin as same_origin

PAGE = Path(__file__).parent.parent / "web/index.html"


def with_page(app: FastAPI, queue: asyncio.Queue[Any], capacity: int | None = None) -> FastAPI:
    """Add the page and /stats to an app. A capacity of None means that the queue has no limit."""

    @app.get("/stats")
    async def stats() -> dict[str, int | bool | None]:
        return {"queued": queue.qsize(), "capacity": capacity, "acks": False}

    @app.get("/")
    async def index() -> FileResponse:
        return FileResponse(PAGE, headers={"Content-Security-Policy": "frame-ancestors 'none'"})

    return app


step0 = with_page(naive.app, naive.queue)
step1 = with_page(keep_receiving.app, keep_receiving.queue)
step2 = with_page(pass_text_on.app, pass_text_on.queue)
step3 = with_page(put_back.app, put_back.channel.queue)
step4 = with_page(validate.app, validate.channel.queue)
step5 = with_page(backpressure.app, backpressure.channel.queue, backpressure.CAPACITY)
step6 = with_page(take_turns.app, take_turns.channel.queue, take_turns.CAPACITY)
step7 = with_page(same_origin.app, same_origin.channel.queue, same_origin.CAPACITY)
