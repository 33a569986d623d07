# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "psutil>=6", "pytest>=8", "uvicorn>=0.53",
#                 "websockets>=17.0"]
# ///
"""Test a websocket server: copy this file beside your server, and run `pytest test_your_copy.py`.

Each test runs the app in a real uvicorn, in a process of its own, and connects real clients to it.
Every wait has a deadline, so a test fails if the server hangs. Change APP and the paths to yours.
"""

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

APP = "server:app"
PRODUCER, CONSUMER = "/ws/producer", "/ws/consumer"
DEADLINE = 5  # seconds
START_DEADLINE = 30  # seconds, because a busy machine takes long to import FastAPI


def wait_for(condition: Callable[[], bool], what: str, seconds: float = DEADLINE) -> None:
    """Wait until the condition holds. Fail if that takes longer than this many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} seconds in vain for {what}"
        time.sleep(0.02)


class Server:
    def __init__(self, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = log
        command = [sys.executable, "-m", "uvicorn", APP, "--port", str(self.port)]
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            wait_for(self.started_or_ended, "the server to start", START_DEADLINE)
            assert self.process.poll() is None, log.read_text()
        except BaseException:
            self.process.kill()
            raise

    def started_or_ended(self) -> bool:
        return "Uvicorn running" in self.log.read_text() or self.process.poll() is not None

    def connect(self, path: str) -> ClientConnection:
        return connect(f"ws://127.0.0.1:{self.port}{path}", proxy=None, close_timeout=DEADLINE)

    def connections(self) -> int:
        states = [conn.status for conn in psutil.Process(self.process.pid).net_connections("tcp")]
        return len(states) - states.count("LISTEN")


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of the test's own. At the end of the test, its log must not contain a traceback."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder, "log"))
        yield server
        server.process.kill()
        server.process.wait()
        assert "Traceback" not in server.log.read_text(), server.log.read_text()


def test_a_payload_flows(server: Server) -> None:
    with server.connect(PRODUCER) as producer, server.connect(CONSUMER) as consumer:
        producer.send('{"value": 1.50}')
        assert producer.recv(DEADLINE) == '{"value": 1.50}'
        assert consumer.recv(DEADLINE) == '{"value": 1.50}'


def test_a_departed_consumer_takes_nothing(server: Server) -> None:
    for _ in range(10):
        with server.connect(CONSUMER):
            pass
    payloads = [str(number) for number in range(20)]
    with server.connect(PRODUCER) as producer, server.connect(CONSUMER) as consumer:
        for payload in payloads:
            producer.send(payload)
        assert [consumer.recv(DEADLINE) for _ in payloads] == payloads


def test_bad_input_gets_its_close_code(server: Server) -> None:
    with server.connect(PRODUCER) as producer, server.connect(CONSUMER) as consumer:
        producer.send("{'value': 1}")
        with pytest.raises(ConnectionClosed) as closed:
            producer.recv(DEADLINE)
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1007
        with pytest.raises(TimeoutError):
            consumer.recv(0.2)


def test_a_full_queue_pushes_back(server: Server) -> None:
    def send_many(producer: ClientConnection) -> None:
        for _ in range(5000):
            producer.send("1")
            producer.recv(DEADLINE)

    with server.connect(PRODUCER) as producer, pytest.raises(ConnectionClosed) as closed:
        send_many(producer)
    assert closed.value.rcvd
    assert closed.value.rcvd.code == 1013


def test_ctrl_c_ends_the_server(server: Server) -> None:
    with server.connect(CONSUMER) as consumer:
        server.process.send_signal(signal.SIGINT)  # on Windows, tests cannot press Ctrl+C
        with pytest.raises(ConnectionClosed) as closed:
            consumer.recv(DEADLINE)
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1012
        server.process.wait(DEADLINE)


def test_nothing_is_left_behind(server: Server) -> None:
    for path in (PRODUCER, CONSUMER):
        for _ in range(10):
            with server.connect(path) as websocket:
                websocket.send("1")  # from now on, uvicorn reads only what the server receives
                websocket.socket.shutdown(socket.SHUT_RDWR)  # as if the client had been killed
    wait_for(lambda: server.connections() == 0, "the connections to end")
