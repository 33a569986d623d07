"""The benchmark notices a server that does not deliver, and the README shows what the benchmark saved."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bench import bench, broadcast, load, partitions, reconnect, report
from tests.kit.ports import free_port
from tests.kit.root import ROOT
from tests.kit.waiting import SLOWNESS, wait_for

PAYLOADS = 50
WORK = load.Work("work", "work", PAYLOADS)
# bench/bare_websockets.py, but for what it does to the payload that is the LIE_AT-th of those it receives.
LIAR = """
import asyncio, itertools, sys
from websockets.asyncio.server import serve

lie, lie_at = sys.argv[1], int(sys.argv[2])
queue, numbers = asyncio.Queue(), itertools.count()

async def handler(websocket):
    if websocket.request.path != "/ws/producer":
        while True:
            await websocket.send(await queue.get())
    held = []
    async for payload in websocket:
        lies = next(numbers) == lie_at and lie
        for copy in {"drops": [], "doubles": [payload] * 2, "changes": [payload + " "]}.get(lies, [payload]):
            await queue.put(copy)
        if lies == "swaps echoes":
            held.append(payload)
        elif lies != "drops an echo":
            for echo in [payload, *held, *[payload] * (lies == "doubles an echo")]:
                await websocket.send(echo)
            held.clear()
        if lies == "hangs up":
            break

async def main():
    async with serve(handler, "127.0.0.1", int(sys.argv[3])) as server:
        await server.serve_forever()

asyncio.run(main())
"""


# A broadcast, but for the second connection's copy of the message that is the LIE_AT-th.
LIAR_TO_ALL = """
import asyncio, itertools, sys
from websockets.asyncio.server import serve

lie, lie_at = sys.argv[1], int(sys.argv[2])
connections, numbers = [], itertools.count()

async def handler(websocket):
    connections.append(websocket)
    last = ""
    async for payload in websocket:
        lies = next(numbers) == lie_at and lie
        for connection in connections:
            copies = [payload]
            if connection is connections[1]:
                copies = {"drops": [], "doubles": [payload] * 2, "repeats": [last]}.get(lies, copies)
            for copy in copies:
                await connection.send(copy)
        last = payload

async def main():
    async with serve(handler, "127.0.0.1", int(sys.argv[3])) as server:
        await server.serve_forever()

asyncio.run(main())
"""


def run(*arguments: str, script: str = "bench/bench.py") -> "subprocess.Popen[str]":
    command = [sys.executable, script, *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


async def figures_of(server: load.Server, work: load.Work = WORK) -> dict[str, float] | str:
    [(name, figures)] = [pair async for pair in bench.visit(server, [work])]
    assert name == work.name
    return figures


async def measured(lie: str, at: int) -> dict[str, float] | str:
    return await figures_of(load.Server("liar", (sys.executable, "-c", LIAR, lie, str(at))))


async def test_an_honest_relay_has_figures() -> None:
    """The relay that lies in the tests below has figures if it does not lie."""
    figures = await measured("", 0)
    assert isinstance(figures, dict), figures
    assert figures["rate"] > 0


@pytest.mark.parametrize("at", [PAYLOADS // 2, PAYLOADS - 1], ids=["amid", "last"])
@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ("drops", f"of {PAYLOADS} payloads 1 never arrived, 0 had no echo"),
        ("doubles", "came twice, or was never sent"),
        ("changes", "came twice, or was never sent"),
        ("drops an echo", "not the next echo|0 never arrived, 1 had no echo"),
        ("doubles an echo", "not the next echo"),
        ("swaps echoes", "not the next echo|0 never arrived, 1 had no echo"),
        ("hangs up", "a producer (was closed|lost its connection)"),
    ],
)
async def test_a_relay_that_fails_one_payload_has_no_figures(
    lie: str, reason: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run is reported as failed."""
    monkeypatch.setattr(load, "STALL", 0.5 * SLOWNESS)
    figures = await measured(lie, at)
    assert isinstance(figures, str), f"a relay that {lie} has figures: {figures}"
    assert re.search(reason, figures), figures


@pytest.mark.parametrize("at", [PAYLOADS // 2, PAYLOADS - 1], ids=["amid", "last"])
@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ("", None),
        ("drops", "not the next message|1 of 50 messages did not reach all"),
        ("doubles", "not the next message"),
        ("repeats", "not the next message"),
    ],
)
async def test_a_broadcast_that_fails_one_copy_has_no_figures(
    lie: str, reason: str | None, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An honest broadcast has figures."""
    monkeypatch.setattr(load, "STALL", 0.5 * SLOWNESS)
    command = (sys.executable, "-c", LIAR_TO_ALL, lie, str(at))
    server = load.Server("liar", command, connection=broadcast.Naive, load=broadcast.Broadcast)
    figures = await figures_of(server, load.Work("work", "work", PAYLOADS, consumers=2, ahead=5))
    if reason is None:
        assert isinstance(figures, dict), figures
        assert figures["rate"] > 0
    else:
        assert isinstance(figures, str), f"a broadcast that {lie} has figures: {figures}"
        assert re.search(reason, figures), figures


def test_the_lessons_and_the_list_do_the_same_broadcasts(tmp_path: Path) -> None:
    """They do so among filters on other topics, too."""
    saved = tmp_path / "broadcast.json"
    options = ("--rounds", "1", "--scale", "0.02", "--save", str(saved))
    process = run("hundred", "others", *options, script="bench/broadcast.py")
    _, progress = process.communicate(timeout=20 * SLOWNESS)
    assert process.returncode == 0, progress
    for rows in json.loads(saved.read_text())["results"].values():
        assert rows["naive list"]["rate"]["ratio"] == 1
        assert rows["pubsub_server.py"]["rate"]["median"] > 0
        assert rows["log_server.py"]["rate"]["median"] > 0


async def test_clients_that_offer_compression_use_it() -> None:
    """The server must agree. The clients still check every payload."""
    relay = load.Server("relay", (sys.executable, "-c", LIAR, "", "0"))
    async with bench.started(relay) as clients:
        await clients.run(load.Work("deflate", "deflate", PAYLOADS, deflate=True))
        assert all(client.deflate for [client] in clients.connections.values())


async def test_a_server_that_failed_is_started_again_for_the_next_work() -> None:
    """Each work gets its figures, in order, or the reason why there are none."""
    works = [load.Work(name, name, PAYLOADS, consumers=count) for name, count in (("one", 1), ("two", 2))]
    server = load.Server("liar", (sys.executable, "-c", LIAR, "doubles", str(PAYLOADS // 2)))
    figures = [pair async for pair in bench.visit(server, works)]
    assert [name for name, _ in figures] == ["one", "two"]
    assert all("came twice" in str(reason) for _, reason in figures)


def test_a_ratio_compares_the_lowest_figures() -> None:
    """What else the machine does makes some figures higher, and none lower."""
    ours = [{"cpu_us": 20.0}, {"cpu_us": 40.0}, {"cpu_us": 26.0}]
    its = [{"cpu_us": 30.0}, {"cpu_us": 20.0}, {"cpu_us": 10.0}]
    assert bench.summary(ours, its)["cpu_us"] == {"median": 26, "min": 20, "max": 40, "ratio": 2}


async def test_a_server_that_does_not_start_is_reported() -> None:
    """The report has the last line that the server printed."""
    server = load.Server("broken", (sys.executable, "-c", "raise SystemExit('no such luck')"))
    assert await figures_of(server) == "did not start: no such luck"


def test_a_part_of_a_run_can_be_chosen_by_name(tmp_path: Path) -> None:
    """It saves its figures. The ratios are to server.py."""
    saved = tmp_path / "results.json"
    names = ("one", "latency", "server.py", "bare websockets")
    process = run(*names, "--rounds", "1", "--scale", "0.02", "--save", str(saved))
    printed, progress = process.communicate(timeout=10 * SLOWNESS)
    assert process.returncode == 0, progress
    assert "bare websockets" in printed
    assert "round 1 of 1" in progress
    results = json.loads(saved.read_text())
    assert list(results["results"]) == ["one", "latency"]
    for rows in results["results"].values():
        assert list(rows) == ["server.py", "bare websockets"]
        assert rows["server.py"]["rate"]["ratio"] == 1
        assert rows["bare websockets"]["rate"]["median"] > 0
    assert results["results"]["latency"]["server.py"]["p99_us"]["median"] > 0


@pytest.mark.parametrize(
    ("number", "server", "count"),
    [
        (signal.SIGINT, "multiproc_server.py", 4),
        (signal.SIGTERM, "multiproc_server.py", 4),
        (signal.SIGINT, "gateway + server.py", 2),
    ],
)
def test_ctrl_c_stops_the_benchmark_and_its_server(number: signal.Signals, server: str, count: int) -> None:
    """So does SIGTERM. The server behind the gateway ends, too, although it has a session of its own."""
    family: list[psutil.Process] = []

    with run("one", server) as process:

        def serving() -> bool:
            family[:] = psutil.Process(process.pid).children(recursive=True)
            return len(family) >= count

        try:
            wait_for(serving, "the server's processes")
            process.send_signal(number)
            _, progress = process.communicate(timeout=5 * SLOWNESS)
            assert process.returncode == 130
            assert progress.endswith("\nstopped\n"), progress
            wait_for(lambda: not any(map(alive, family)), "the server to end", SLOWNESS)
        finally:
            process.kill()


def test_an_unknown_name_is_an_error() -> None:
    """The error says which names there are, of servers and of kinds of work."""
    _, printed = run("fast").communicate(timeout=5 * SLOWNESS)
    assert "unknown: fast; there are one, latency" in printed


def test_the_readme_shows_the_saved_figures() -> None:
    """`python bench/bench.py --readme` writes its tables and its plot."""
    results = json.loads(bench.RESULTS.read_text())
    readme = bench.README.read_text()
    assert readme == report.with_section(readme, "bench", report.section(results))
    assert bench.PLOT.read_text() == report.plot(results)


def test_the_readme_shows_the_saved_figures_of_broadcasts() -> None:
    """`python bench/broadcast.py --readme` writes them."""
    results = json.loads(broadcast.RESULTS.read_text())
    readme = broadcast.README.read_text()
    assert readme == report.with_section(readme, "broadcast", broadcast.section(results))


def test_the_readme_shows_runs_that_failed() -> None:
    """It does not leave them out."""
    results = json.loads(bench.RESULTS.read_text())
    before = report.plot(results).count(">failed<")
    results["results"]["one"]["naive"] = {"failed": "of 50 payloads 1 never arrived"}
    assert "| naive | failed |" in report.section(results)
    assert report.plot(results).count(">failed<") == before + 2, "in the panels for CPU and memory"
    assert "FAILED: of 50 payloads 1 never arrived" in report.table(results)


async def test_clients_come_back_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """bench/reconnect.py counts the attempts until each client has a connection again."""
    monkeypatch.setattr(reconnect, "CLIENTS", 5)
    attempts, handshakes = await reconnect.restart(lambda failures: 0.1)
    assert len(handshakes) == 5
    assert attempts.total() >= 5


async def test_partitions_spread_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """bench/partitions.py: with one partition, one node has all payloads."""
    for name, value in {"KEYS": 4, "QUEUED": 25, "FLOWING": 2}.items():
        monkeypatch.setattr(partitions, name, value)
    # The port that the system chooses may leave none free for the cluster's bus, 10,000 higher.
    monkeypatch.setattr(partitions, "free_port", free_port)
    memory, _ = await partitions.run(1)
    assert sorted(int(share) for share in re.findall(r"(\d+)%", memory))[-1] > 90
