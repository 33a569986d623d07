"""What lessons/redis_server.py survives: a failover, a rolling restart, a closed terminal."""

import asyncio
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import redis
from websockets.exceptions import ConnectionClosed

from tests.kit.clients import client, consumer, drain, numbered, produce, receive, write
from tests.kit.commands import CONSUMER, PRODUCER, SERVERS, with_options
from tests.kit.constants import with_constants
from tests.kit.namespaces import has_cables
from tests.kit.ports import free_port
from tests.kit.redis import (
    CLAIM_AFTER,
    DOWN_AFTER,
    FAILOVER,
    REDIS_TIMEOUT,
    Node,
    redis_executable,
    shared_redis,
)
from tests.kit.root import ROOT
from tests.kit.servers import Server, running, tracebacks
from tests.kit.storm import Storm
from tests.kit.waiting import SLOWNESS, TIMEOUT, until, wait_for
from tests.kit.workers import serving, workers

# `nohup pytest` lets every process ignore SIGHUP, the servers included.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

COMMAND = SERVERS["redis_server.py"]
# uvicorn gives up a restart if a worker is not ready in time, which is 5 s by default.
PATIENT = ("--timeout-worker-healthcheck", f"{6 * TIMEOUT:.0f}")
SENTINEL_CONF = """\
bind 127.0.0.1
port {port}
dir {folder}
sentinel monitor queue 127.0.0.1 {primary} 2
sentinel down-after-milliseconds queue {down_after:.0f}
sentinel failover-timeout queue {again:.0f}
"""


@pytest.fixture
def stream_url() -> str:
    return shared_redis().url()


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a Redis or a Sentinel that hangs: it accepts connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


class Deployment:
    """A primary, its replica, and three Sentinels that watch them."""

    def __init__(self) -> None:
        self.primary, self.replica = Node(), Node()
        self.replica.kill()
        self.replica.start_as_replica(self.primary)
        wait_for(lambda: self.replica.follows(self.primary), "the replica to follow")
        self.databases = itertools.count()
        self.folder = tempfile.TemporaryDirectory()
        self.ports = [free_port() for _ in range(3)]
        self.sentinels = [self.start_sentinel(port) for port in self.ports]
        self.admins: list[Any] = [redis.Redis(port=port, decode_responses=True) for port in self.ports]
        wait_for(self.can_fail_over, "the Sentinels to know each other", FAILOVER)

    def start_sentinel(self, port: int) -> subprocess.Popen[bytes]:
        values = {"port": port, "folder": self.folder.name, "primary": self.primary.port}
        conf = Path(self.folder.name) / f"{port}.conf"
        conf.write_text(SENTINEL_CONF.format(**values, down_after=DOWN_AFTER, again=3 * DOWN_AFTER))
        command = [redis_executable(), str(conf), "--sentinel"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def knows_all(self, sentinel: Any) -> bool:
        """Whether this Sentinel sees the other two, the primary, and its replica."""
        with suppress(redis.ConnectionError):
            primary, replicas = sentinel.sentinel_masters()["queue"], sentinel.sentinel_slaves("queue")
            healthy = [row["port"] for row in replicas if row["flags"] == "slave"]
            known = primary["port"], healthy, primary["num-other-sentinels"]
            return bool(known == (self.primary.port, [self.replica.port], 2))
        return False

    def can_fail_over(self) -> bool:
        """Whether two Sentinels know all. A third one that was too busy may do nothing for 30 seconds."""
        return sum(self.knows_all(admin) for admin in self.admins) >= 2

    def url(self) -> str:
        """The address of a database that nobody uses yet."""
        sentinels = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"redis+sentinel://{sentinels}/queue/{next(self.databases)}"

    async def fail_over(self) -> float:
        """Wait until the replica is the primary. Returns when that was."""
        await until(self.replica.is_primary, "the replica to be promoted", FAILOVER)
        self.primary, self.replica = self.replica, self.primary
        return time.monotonic()

    async def restore(self) -> None:
        """Start the old primary again, as a replica, and wait until a failover is possible again."""
        self.replica.start_as_replica(self.primary)
        await until(lambda: self.replica.follows(self.primary), "the old primary to follow", FAILOVER)
        await until(self.can_fail_over, "the Sentinels to know of it", FAILOVER)

    def close(self) -> None:
        for process in self.sentinels:
            process.kill()
            process.wait()
        for admin in self.admins:
            admin.close()
        self.primary.close()
        self.replica.close()
        self.folder.cleanup()


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    deployment = Deployment()
    yield deployment
    deployment.close()


async def test_the_server_follows_a_failover(deployment: Deployment) -> None:
    """The primary is killed under load. The server follows within 5 seconds of the promotion.

    The old primary comes back as a replica. With REPLICAS = 1, every payload that was echoed arrives.
    """
    command = with_constants("lessons.redis_server", REPLICAS=1)
    with running(command, env={"REDIS_URL": deployment.url()}) as server, ExitStack() as stack:
        storm = Storm([server, server])
        stack.callback(storm.close)
        async with asyncio.TaskGroup() as group:
            for start in range(2):
                group.create_task(storm.produce(start))
            await storm.flow()
            deployment.primary.kill()
            promoted = await deployment.fail_over()
            await until(lambda: server.get("/stats")[0] == 200, "the server to follow", FAILOVER)
            took = time.monotonic() - promoted
            await deployment.restore()
            await storm.flow()
            storm.ending = True
        await until(lambda: storm.echoed <= set(storm.received()), "all that was echoed", FAILOVER)
        assert took < 5 * SLOWNESS
        assert server.log.rindex("Redis is back") > server.log.rindex("Redis is gone")
        assert tracebacks(server.log) == 0


def listens(port: int) -> bool:
    """Whether somebody accepts connections at this port."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def connections(server: Server, node: Node) -> int:
    """How many connections the server has to a Redis."""
    ends = [end for process in server.processes() for end in process.net_connections("tcp")]
    return sum(end.status == "ESTABLISHED" and end.raddr.port == node.port for end in ends)


async def test_a_primary_that_hangs_is_left(deployment: Deployment) -> None:
    """The primary answers nothing. The server follows the Sentinels to the new one, with all connections.

    The old one goes on, and still takes itself for the primary. What it got now would be lost.
    """
    command = with_constants("lessons.redis_server", REDIS_TIMEOUT=REDIS_TIMEOUT)
    payloads = [str(number) for number in range(20)]
    with running(command, env={"REDIS_URL": deployment.url()}) as server:
        async with consumer(server) as taker:
            # At the same time, so that the server has all three connections.
            await asyncio.gather(*(produce(server, [payload]) for payload in payloads))
            assert sorted(await taker.payloads(20)) == sorted(payloads)
            hanging = deployment.primary
            hanging.stop()
            try:
                promoted = await deployment.fail_over()
                await until(lambda: "Redis is back" in server.log, "the server to follow", FAILOVER)
                took = time.monotonic() - promoted
                await until(lambda: connections(server, hanging) == 0, "the server to leave the old primary")
            finally:
                hanging.go_on()
            later = [str(number) for number in range(20, 40)]
            await asyncio.gather(*(produce(server, [payload]) for payload in later))
            # Payloads whose acknowledgements the new primary has not heard of come again.
            received: set[str] = set()
            while not received.issuperset(later):
                received.add(await taker.payload())
            assert received <= {*payloads, *later}
        hanging.kill()
        await deployment.restore()
        assert took < 5 * SLOWNESS
        assert tracebacks(server.log) == 0


async def insist(server: Server, payload: str) -> None:
    """Send the payload again and again, until there is a receipt."""
    deadline = time.monotonic() + FAILOVER
    while time.monotonic() < deadline:
        with suppress(ConnectionClosed):
            await produce(server, [payload])
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"no receipt: {server.log}")


async def lose_the_primary(deployment: Deployment, server: Server) -> tuple[set[str], set[str]]:
    """Send 40 MiB while the replica is stopped, kill the primary, and let the replica take its place.

    Returns the payloads that were echoed, and those that came afterwards. The sockets between the two hold
    some MiB, which reach the replica all the same. It does not know that a consumer has the first payload.
    """
    payloads = numbered(40, size=1024 * 1024 - 10)
    echoed = {"1"}
    async with AsyncExitStack() as stack:
        producer = await stack.enter_async_context(client(server, PRODUCER))
        await insist(server, "1")
        deployment.replica.stop()
        try:
            write(producer, payloads)
            with suppress(ConnectionClosed):
                while len(echoed) <= len(payloads):
                    echoed.add(await receive(producer))
            holder = await stack.enter_async_context(client(server, CONSUMER))
            assert await receive(holder) == "1"
        finally:
            deployment.primary.kill()
            deployment.replica.go_on()
        await deployment.fail_over()
        await until(lambda: server.get("/stats")[0] == 200, "the server to follow")
        received = {"1", *await drain(server)}
        await holder.send("ack")
        await holder.close()
        assert holder.close_code == 1000
    return echoed, received


async def test_a_slow_replica_may_lack_payloads(deployment: Deployment) -> None:
    """With REPLICAS = 0, a receipt says that the primary has the payload. If it dies, that is not enough."""
    with running(COMMAND, env={"REDIS_URL": deployment.url()}) as server:
        echoed, received = await lose_the_primary(deployment, server)
        assert len(echoed) == 41
        assert len(received) < 41
        await deployment.restore()
        assert tracebacks(server.log) == 0


async def test_nothing_is_lost_that_a_replica_must_have(deployment: Deployment) -> None:
    """With REPLICAS = 1, there is no receipt until the replica has the payload."""
    command = with_constants("lessons.redis_server", REPLICAS=1)
    with running(command, env={"REDIS_URL": deployment.url()}) as server:
        echoed, received = await lose_the_primary(deployment, server)
        assert echoed == {"1"}
        assert "1" in received
        reason = "0 of 1 replicas have the payload: try again later"
        assert f"closed with 1013: {reason}" in server.log
        # There is no replica now.
        async with client(server, PRODUCER) as producer:
            await producer.send("2")
            await producer.wait_closed()
            assert (producer.close_code, producer.close_reason) == (1013, reason)
        await deployment.restore()
        await insist(server, "2")
        assert set(await drain(server)) == {"2"}
        assert tracebacks(server.log) == 0


async def test_a_read_only_replica_is_no_redis() -> None:
    """Redis becomes a replica: producers get 1013, /stats 503, and no server starts. Then it is promoted."""
    node = Node()
    with closing(node), running(COMMAND, env={"REDIS_URL": node.url(0)}) as server:

        def is_watched() -> bool:
            return any("b" in row["flags"] for row in node.admin.client_list())

        async with client(server, CONSUMER + "?prefetch=5") as taker:
            await produce(server, ["1", "2"])
            assert [await receive(taker) for _ in range(2)] == ["1", "2"]
            # A call that only reads would still work.
            await until(is_watched, "the worker to wait for more payloads")
            node.admin.replicaof("127.0.0.1", free_port())
            status, _, body = server.get("/stats")
            assert (status, "Redis does not answer" in body) == (503, True)
            async with client(server, PRODUCER) as producer:
                await producer.send("3")
                await producer.wait_closed()
                assert producer.close_code == 1013
            assert "Redis is gone (" in server.log
            [line] = await asyncio.to_thread(refusals, [node.url(0)])
            assert "(You can't write against a read only replica" in line
            assert "Redis is back" not in server.log
            node.admin.replicaof("NO", "ONE")
            await produce(server, ["3"])
            assert server.get("/stats")[0] == 200
            assert await receive(taker) == "3"
        assert server.log.count("Redis is gone") == server.log.count("Redis is back") == 1
        assert tracebacks(server.log) == 0


WRONG_URLS = [
    "localhost",
    "http://localhost",
    "redis://localhost:port",
    "redis://:s3cret#@localhost:6379",
    "redis://localhost?nonsense=s3cret",
    "redis+sentinel://localhost:port/queue",
    "redis+sentinel://localhost",
    "redis+cluster://:s3cret#@localhost:6379",
]


def refusals(urls: list[str], command: list[str] = COMMAND) -> list[str]:
    """Start a server with each of the URLs. Each must end with exit code 3 and a line, which is returned."""
    command = with_options(command, "--workers", "1")
    servers = [Server(command, env={"REDIS_URL": url}) for url in urls]
    lines = []
    try:
        for url, server in zip(urls, servers, strict=True):
            assert server.ends_within(20) is not None, url
            assert server.process.returncode == 3
            [line] = [line for line in server.log.splitlines() if line.startswith("ERROR:")]
            lines.append(line)
            assert tracebacks(server.log) == 0
            assert "s3cret" not in server.log
    finally:
        for server in servers:
            server.kill()
    return lines


def test_a_wrong_url_is_refused_in_one_line() -> None:
    """The line says what a URL looks like, and contains no part of a password."""
    for line in refusals(WRONG_URLS):
        assert line.startswith("ERROR:    REDIS_URL is not valid: use redis://HOST:PORT/DB, redis+sentinel:")


def test_no_sentinel_and_no_node_at_the_start() -> None:
    """The line says where the server has looked."""
    hosts = f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}"
    schemes = ("redis+sentinel", "redis+cluster")
    lines = refusals([f"{scheme}://:s3cret@{hosts}/queue" for scheme in schemes])
    for scheme, line in zip(schemes, lines, strict=True):
        assert line.startswith(f"ERROR:    no Redis at {scheme}://{hosts}/queue (")


def test_a_redis_that_hangs_at_the_start_is_reported(silent: int) -> None:
    """The server waits for an answer, but not forever."""
    command = with_constants("lessons.redis_server", REDIS_TIMEOUT=1)
    [line] = refusals([f"redis://127.0.0.1:{silent}"], command)
    assert line.startswith(f"ERROR:    no Redis at redis://127.0.0.1:{silent} (no answer): ")


@cache
def folder_of_redis_with_tls() -> str | None:
    """Redis can be built without TLS. Such a Redis takes the option for a mistake."""
    for folder in os.get_exec_path():
        with suppress(OSError):
            command = [f"{folder}/redis-server", "--port", "0", "--tls-port", "1"]
            if "Failed to configure TLS" in subprocess.run(command, capture_output=True, text=True).stdout:
                return folder
    return None


@pytest.fixture
def tls_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Node, and all that comes first on the PATH, be a Redis with TLS."""
    folder = folder_of_redis_with_tls()
    if folder is None:
        pytest.skip("needs a Redis with TLS (Debian: apt install redis-server)")
    monkeypatch.setenv("PATH", folder + os.pathsep + os.environ["PATH"])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate for this machine (`cert.pem`), and its key."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl (Debian: apt install openssl)")
    folder = tmp_path_factory.mktemp("certificate")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem"]
    command += ["-out", "cert.pem", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def tls_files(certificate: Path) -> list[str]:
    cert, key = str(certificate / "cert.pem"), str(certificate / "key.pem")
    options = ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert]
    return [*options, "--tls-auth-clients", "no", "--tls-replication", "yes"]


@contextmanager
def sentinel_of(primary: Node, port: int, folder: Path, *options: str) -> Iterator[int]:
    """Start a Sentinel with the password `word` for a primary that gets the password `s3cret`."""
    primary.admin.config_set("requirepass", "s3cret")
    conf = folder / "sentinel.conf"
    conf.write_text(f"sentinel monitor queue 127.0.0.1 {port} 1\nsentinel auth-pass queue s3cret\n")
    port = free_port()
    command = [redis_executable(), str(conf), "--sentinel", "--bind", "127.0.0.1", "--requirepass", "word"]
    if options:
        command += ["--port", "0", "--tls-port", str(port), *options]
    else:
        command += ["--port", str(port)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: listens(port), "the Sentinel")
            yield port
        finally:
            process.kill()


async def test_a_sentinel_that_hangs_is_passed_over(silent: int, tmp_path: Path) -> None:
    """REDIS_URL names it first. The server asks the next one."""
    with closing(Node()) as primary, sentinel_of(primary, primary.port, tmp_path) as port:
        url = f"redis+sentinel://:s3cret@127.0.0.1:{silent},127.0.0.1:{port}/queue/0"
        with running(COMMAND, env={"REDIS_URL": url, "SENTINEL_PASSWORD": "word"}) as server:
            await produce(server, ["1", "2"])
            assert await drain(server) == ["1", "2"]


async def test_sentinels_with_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis and the Sentinels have passwords of their own. A wrong one is refused in one line."""
    with closing(Node()) as primary, sentinel_of(primary, primary.port, tmp_path) as port:
        url = f"redis+sentinel://:s3cret@127.0.0.1:{port}/queue/0"
        with running(COMMAND, env={"REDIS_URL": url, "SENTINEL_PASSWORD": "word"}) as server:
            await produce(server, ["1", "2"])
            assert await drain(server) == ["1", "2"]
        monkeypatch.setenv("SENTINEL_PASSWORD", "wrong s3cret")
        [line] = await asyncio.to_thread(refusals, [url])
        address = f"redis+sentinel://127.0.0.1:{port}/queue/0"
        assert line.startswith(f"ERROR:    no Redis at {address} (No master found for 'queue' : ")
        assert "AuthenticationError" in line
        assert len(line) < 250


async def test_sentinels_with_tls(tls_redis: None, certificate: Path, tmp_path: Path) -> None:
    """Redis and the Sentinels listen for TLS, and have passwords."""
    files, port = tls_files(certificate), free_port()
    with (
        closing(Node("--tls-port", str(port), *files)) as primary,
        sentinel_of(primary, port, tmp_path, *files) as sentinel,
    ):
        url = f"rediss+sentinel://:s3cret@127.0.0.1:{sentinel}/queue/0"
        env = {"REDIS_URL": f"{url}?ssl_ca_certs={certificate / 'cert.pem'}", "SENTINEL_PASSWORD": "word"}
        with running(COMMAND, env=env) as server:
            await produce(server, ["1", "2"])
            assert await drain(server) == ["1", "2"]
        [line] = await asyncio.to_thread(refusals, [url])
        assert "No master found for 'queue' : " in line


async def test_a_cluster_with_tls(tls_redis: None, certificate: Path) -> None:
    """The nodes listen for TLS, and have a password."""
    port = free_port()
    options = ["--cluster-enabled", "yes", "--databases", "1", "--tls-cluster", "yes"]
    node = Node(*options, "--tls-port", str(port), *tls_files(certificate))
    with closing(node):
        node.admin.cluster("ADDSLOTS", *range(16384))
        await until(lambda: node.admin.cluster("INFO")["cluster_state"] == "ok", "the cluster")
        node.admin.config_set("requirepass", "s3cret")
        url = f"rediss+cluster://:s3cret@127.0.0.1:{port}?ssl_ca_certs={certificate / 'cert.pem'}"
        with running(COMMAND, env={"REDIS_URL": url}) as server:
            await produce(server, ["1", "2"])
            assert await drain(server) == ["1", "2"]
        [line] = await asyncio.to_thread(refusals, [url.partition("?")[0]])
        assert "certificate verify failed" in line


def test_a_network_that_drops_everything() -> None:
    """Between a server and Redis, under load, for twice REDIS_TIMEOUT: nothing that was echoed is lost."""
    if not has_cables():
        pytest.skip("needs networks of its own (Debian: apt install iproute2; Linux only)")
    program = [sys.executable, "-m", "tests.partition", str(2 * REDIS_TIMEOUT)]
    output = subprocess.check_output([*program, f"REDIS_TIMEOUT={REDIS_TIMEOUT}"], cwd=ROOT, text=True)
    found = re.fullmatch(r"(\d+) echoed, 0 lost, \d+ twice\n", output)
    assert found, output
    assert int(found[1]) > 100


@pytest.fixture
def cluster() -> Iterator[list[Node]]:
    """Four nodes of a Redis Cluster. The first one has the queue, and the last one is its replica."""
    options = ("--cluster-enabled", "yes", "--databases", "1", "--cluster-node-timeout", f"{DOWN_AFTER:.0f}")
    with ExitStack() as stack:
        nodes = [stack.enter_context(closing(Node(*options))) for _ in range(4)]
        queue = nodes[0].admin.cluster("KEYSLOT", "{queue}")
        slots = [slot for slot in range(16384) if slot != queue]
        for node, some in zip(nodes, ([queue], slots[::2], slots[1::2]), strict=False):
            node.admin.cluster("ADDSLOTS", *some)
        for node in nodes[1:]:
            node.admin.cluster("MEET", "127.0.0.1", nodes[0].port)

        def is_complete() -> bool:
            known = [int(node.admin.cluster("INFO")["cluster_known_nodes"]) for node in nodes]
            states = [node.admin.cluster("INFO")["cluster_state"] for node in nodes]
            return known == [4] * 4 and states == ["ok"] * 4

        wait_for(is_complete, "the nodes to know each other", FAILOVER)
        nodes[3].admin.cluster("REPLICATE", nodes[0].admin.cluster("MYID"))
        wait_for(lambda: nodes[3].follows(nodes[0]), "the replica to follow", FAILOVER)
        yield nodes


async def fail_over(replica: Node) -> None:
    """Let a replica of a cluster take over. Redis tries for five seconds, and then gives up."""
    for _ in range(6):
        replica.admin.cluster("FAILOVER")
        with suppress(AssertionError):
            await until(replica.is_primary, "the replica to be promoted", 6)
            return
    raise AssertionError("the replica was not promoted")


async def test_the_server_finds_its_node_of_a_cluster(cluster: list[Node]) -> None:
    """REDIS_URL names two nodes without the queue. The server finds the third, and follows its failovers.

    It asks them for each connection to Redis, and not for each call.

    A server starts though the first node that REDIS_URL names is down.

    If REDIS_URL names one node as if it were the only Redis, the error says where the queue is.
    """

    def asked() -> int:
        return int(cluster[1].admin.info("stats")["total_connections_received"])

    [line] = await asyncio.to_thread(refusals, [f"redis://127.0.0.1:{cluster[1].port}"])
    assert f"(MOVED to 127.0.0.1:{cluster[0].port})" in line
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in cluster[1:3])
    with running(COMMAND, env={"REDIS_URL": f"redis+cluster://{hosts}"}) as server:
        await produce(server, ["1", "2"])
        assert cluster[0].admin.xlen("{queue}") == 2
        async with consumer(server) as taker:
            assert await taker.payload() == "1"
        await until(lambda: server.queued() == 1, "the second payload to come back")
        before = asked()
        for _ in range(20):
            server.queued()
        assert asked() - before < 10
        # Both nodes live on. The old one says that it is not the primary.
        await fail_over(cluster[3])
        await insist(server, "3")
        await until(lambda: cluster[0].follows(cluster[3]), "the old primary to follow", FAILOVER)
        cluster[3].kill()
        await until(cluster[0].is_primary, "the old primary to be promoted", FAILOVER)
        await insist(server, "4")
        assert await drain(server) == ["2", "3", "4"]
        assert tracebacks(server.log) == 0
    # The node with the first slots is killed. Slots without a node are no reason to stop the others.
    for node in (cluster[0], cluster[2]):
        node.admin.config_set("cluster-require-full-coverage", "no")
    cluster[1].kill()
    with running(COMMAND, env={"REDIS_URL": f"redis+cluster://{hosts}"}) as server:
        await insist(server, "5")
        assert await drain(server) == ["5"]


async def test_a_rolling_restart_loses_nothing(stream_url: str) -> None:
    """`kill -HUP` under load replaces both workers, one after the other. Every echoed payload arrives."""
    command = with_options(
        with_constants("lessons.redis_server", CLAIM_AFTER=CLAIM_AFTER), "--workers", "2", *PATIENT
    )
    with running(command, env={"REDIS_URL": stream_url}) as server, ExitStack() as stack:
        await until(lambda: serving(server) == 2, "both workers")
        old = workers(server)
        storm = Storm([server, server])
        stack.callback(storm.close)
        async with asyncio.TaskGroup() as group:
            for start in range(2):
                group.create_task(storm.produce(start))
            await storm.flow()
            server.interrupt(signal.SIGHUP)
            await until(
                lambda: not any(worker.is_running() for worker in old), "the old workers to end", FAILOVER
            )
            await storm.flow()
            storm.ending = True
        await until(lambda: storm.echoed <= set(storm.received()), "all that was echoed", FAILOVER)
        assert len(workers(server)) == 2
        assert tracebacks(server.log) == 0


@pytest.mark.parametrize("count", [1, 2])
async def test_closing_the_terminal_ends_all_processes(stream_url: str, count: int) -> None:
    """The kernel sends SIGHUP to all of them. No worker runs on, and consumers are told that they end."""
    command = with_options(COMMAND, "--workers", str(count), *PATIENT)
    with running(command, env={"REDIS_URL": stream_url}) as server:
        await until(lambda: serving(server) == count, "the workers")
        async with client(server, CONSUMER) as waiting:
            os.killpg(server.process.pid, signal.SIGHUP)
            await waiting.wait_closed()
            assert waiting.close_code == 1012
        await until(lambda: not server.processes(), "all to end", FAILOVER)
        assert tracebacks(server.log) == 0


async def test_nohup_keeps_one_process_running(stream_url: str) -> None:
    """uvicorn itself sets aside what `nohup` did if there is more than one worker."""
    with running(["nohup", *COMMAND], env={"REDIS_URL": stream_url}) as server:
        os.killpg(server.process.pid, signal.SIGHUP)
        await produce(server, ["1"])
        assert await drain(server) == ["1"]
