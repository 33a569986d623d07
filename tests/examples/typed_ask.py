"""Ask clients a question, as lessons/typed_server.md shows it: a call from the server to a client."""

import asyncio
import itertools
from typing import Annotated, Literal

from fastapi import Body, Depends

from lessons import typed_server
from lessons.typed_server import Board, Call, Client, Numbered, Router, app, clients, same_origin

__all__ = ["app"]
ANSWER_TIMEOUT = 4.0  # seconds
users = Router(prefix="user.")
numbers = itertools.count()
waiting: dict[tuple[Client, int], asyncio.Future[bool]] = {}


class Question(Numbered):
    type: Literal["question"] = "question"
    text: str


class Answer(Call):
    yes: bool


async def ask(client: Client, text: str) -> bool:
    """Ask a client. Raise TimeoutError if it does not answer."""
    if asyncio.current_task() is client.endpoint:
        raise RuntimeError("a handler cannot wait for its own client: start a task that asks")
    question = Question(id=next(numbers), text=text)
    answer: asyncio.Future[bool] = asyncio.Future()
    waiting[client, question.id] = answer
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            await client.outbox.put(question.model_dump_json())
            return await answer
    finally:
        del waiting[client, question.id]


@users.on("answer")
async def take_answer(call: Answer, client: Client) -> None:
    """Hand an answer to ask(). An answer that comes too late is ignored."""
    answer = waiting.get((client, call.id))
    if answer and not answer.done():
        answer.set_result(call.yes)


@app.post("/boards/{board}/questions", dependencies=[Depends(same_origin)])
async def ask_all(board: Board, text: Annotated[str, Body(embed=True)]) -> dict[str, int]:
    """Ask all who watch a board, and count the answers."""
    watchers = [client for client in clients if board in client.topics]
    questions = [ask(client, text) for client in watchers]
    answers = await asyncio.gather(*questions, return_exceptions=True)
    return {"yes": answers.count(True), "no": answers.count(False)}


typed_server.messages.include(users)
