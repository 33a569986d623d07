"""Measure what each copy of a message costs a server that sends it to every subscriber.

    python bench/broadcast.py                  all of it, in three minutes, to bench/broadcast.json
    python bench/broadcast.py --peers          fastapi-websocket-pubsub too; see requirements-peers.txt
    python bench/broadcast.py --readme         write bench/README.md's section from broadcast.json

Names, and how it is measured, are as in bench.py. Every subscriber checks that every message comes, once, in
order.
"""

import json
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT, RESULTS, README = BENCH.parent, BENCH / "broadcast.json", BENCH / "README.md"
if not __package__:
    sys.path[0] = str(ROOT)

from bench.bench import UVICORN, main  # noqa: E402
from bench.load import Connection, Load, Server, Work  # noqa: E402
from bench.report import grid, with_section  # noqa: E402

AHEAD = 10  # messages on their way: fewer than a buffer holds
OTHERS = ("a/{}", "b/{}/+", "+/{}/c", "d/{}/#")  # filters that no message matches


class Broadcast(Load):
    """Connections that all subscribe, also the one that publishes, as they must in the naive list."""

    def begin(self, work: Work, payloads: list[bytes]) -> None:
        super().begin(work, payloads)
        self.due: Counter[Connection] = Counter()  # the next payload's place, for each connection
        self.copies: Counter[bytes] = Counter()

    def arrived(self, consumer: Connection, payload: bytes) -> None:
        due = self.due[consumer]
        if due == len(self.payloads) or payload != self.payloads[due]:
            return self.fail(f"not the next message: {payload[:80]!r}")
        self.due[consumer] += 1
        self.copies[payload] += 1
        if self.copies[payload] == sum(map(len, self.connections.values())):
            self.missing.remove(payload)
            self.echoes += 1
            self.advance()

    def unfinished(self) -> str:
        return f"{len(self.missing)} of {len(self.payloads)} messages did not reach all"

    async def run(self, work: Work, scale: float = 1) -> dict[str, float]:
        if isinstance(work, AmongOthers):
            await self.connect("consumer", 1)
            subscriber = self.connections["consumer"][0]
            assert isinstance(subscriber, Naive)
            subscriber.subscribe([OTHERS[n % len(OTHERS)].format(n) for n in range(work.others)])
        figures = await super().run(work, scale)
        copies = work.producers + work.consumers
        return {**figures, "cpu_us": figures["cpu_us"] / copies, "rate": figures["rate"] * copies}


class Naive(Connection):
    path = "/ws"

    def heard(self, payload: bytes) -> None:
        self.load.arrived(self, payload)

    def subscribe(self, topics: list[str]) -> None:
        """Nobody can."""


class Lesson(Naive):
    path = "/ws?topic=news"

    def send(self, payload: bytes) -> None:
        super().send(b'{"type":"publish","topic":"news","data":' + payload + b"}")

    def heard(self, payload: bytes) -> None:
        match json.loads(payload):
            case {"type": "message"}:
                super().heard(payload[payload.index(b'"data":') + 7 : payload.rindex(b',"from":')])
            case {"type": "subscribed", "topic": "news"}:
                self.ready.set()
            case {"type": "error" | "dropped"}:
                self.load.fail(payload.decode())

    def subscribe(self, topics: list[str]) -> None:
        for topic in topics:
            super().send(json.dumps({"type": "subscribe", "topic": topic}).encode())

    def on_ws_connected(self, transport: Any) -> None:
        self.transport = transport


class Log(Naive):
    """A consumer of a log, or its producer, which gets each payload back as its receipt."""

    path = "/ws/news/{role}"

    def heard(self, payload: bytes) -> None:
        if self.role == "producer":
            return super().heard(payload)
        frame = json.loads(payload)
        if "epoch" in frame:
            self.ready.set()
        elif "offset" in frame:
            super().heard(payload[payload.index(b'"payload": ') + 11 : -1])
        else:
            self.load.fail(payload.decode())

    def on_ws_connected(self, transport: Any) -> None:
        self.transport = transport
        if self.role == "producer":
            self.ready.set()


class Package(Naive):
    """fastapi-websocket-pubsub's calls and answers, in both directions."""

    def call(self, method: str, **arguments: object) -> None:
        request = {"method": method, "arguments": arguments, "call_id": method}
        super().send(json.dumps({"request": request}).encode())

    def send(self, payload: bytes) -> None:
        # By default, who publishes gets no copy.
        self.call("publish", topics=["news"], data=json.loads(payload), sync=False, notifier_id="other")

    def heard(self, payload: bytes) -> None:
        said = json.loads(payload)
        if request := said.get("request"):
            answer = {"call_id": request["call_id"], "result": None, "result_type": None}
            super().send(json.dumps({"response": answer}).encode())
            super().heard(json.dumps(request["arguments"]["data"], separators=(",", ":")).encode())
        elif said["response"]["call_id"] == "subscribe":
            self.ready.set()

    def on_ws_connected(self, transport: Any) -> None:
        self.transport = transport
        self.call("subscribe", topics=["news"])


@dataclass(frozen=True)
class AmongOthers(Work):
    others: int = 10_000  # subscriptions to other topics


NAIVE = (*UVICORN, "lessons.naive.pubsub_server:app", "--port")
LESSON = (*UVICORN, "lessons.pubsub_server:app", "--port")
LOG = (*UVICORN, "lessons.log_server:app", "--port")
PACKAGE = (sys.executable, "bench/fastapi_websocket_pubsub_server.py")
SERVERS = [
    Server("naive list", NAIVE, connection=Naive, load=Broadcast),
    Server("pubsub_server.py", LESSON, connection=Lesson, load=Broadcast),
    Server("log_server.py", LOG, connection=Log, load=Broadcast),
]
PEERS = [
    Server(
        "fastapi-websocket-pubsub", PACKAGE, connection=Package, load=Broadcast,
        package="fastapi-websocket-pubsub",
    ),
]  # fmt: skip
WORKS = [
    Work("hundred", "100 subscribers", 1000, consumers=99, ahead=AHEAD),
    Work("thousand", "1,000 subscribers", 100, consumers=999, ahead=AHEAD),
    AmongOthers("others", "100, and 10,000 filters on other topics", 1000, consumers=99, ahead=AHEAD),
]


def section(results: dict[str, Any]) -> str:
    """bench/README.md's, between its markers."""
    works, rows = results["works"], results["results"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())

    def cost(work: str, server: str) -> str:
        if "failed" in (row := rows[work][server]):
            return "failed"
        cpu = row["cpu_us"]
        return f"{cpu['min']:.1f} (to {cpu['max']:.1f}) x{cpu['ratio']:.2f}"

    text = (
        "`pip install -r bench/requirements-peers.txt && python bench/broadcast.py --peers` measured this, "
        f"on {results['date']}, on {results['cores']} cores of {results['cpu']} that the clients and the "
        f"server shared, with {versions}: server CPU in microseconds per delivered copy, the lowest of "
        f"{results['rounds']} rounds (the highest in brackets), and its ratio to the naive list's. Every "
        "subscriber checked that every message came, once, in order."
    )
    table = grid(
        [work["title"] for work in works.values()],
        [[server, *(cost(work, server) for work in works)] for server in rows["hundred"]],
    )
    return f"\n{textwrap.fill(text, 115)}\n\n{table}\n"


def write(results: dict[str, Any]) -> None:
    README.write_text(with_section(README.read_text(), "broadcast", section(results)))


if __name__ == "__main__":
    sys.exit(main(SERVERS, PEERS, WORKS, RESULTS, write))
