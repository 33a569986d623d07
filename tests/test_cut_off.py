"""A client's network drops everything: what the queue servers do then, and what may be lost."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.kit.namespaces import has_cables
from tests.kit.root import ROOT
from tests.kit.waiting import SLOWNESS

SERVERS = ["server.py", "multiproc_server.py", "ack_server.py", "redis_server.py"]
WITH_ACKS = ["ack_server.py", "redis_server.py"]


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All servers at once, because each spends most of the time waiting."""
    if not has_cables():
        pytest.skip("needs networks of its own (Debian: apt install iproute2; Linux only)")
    env = {**os.environ, "PING": f"{SLOWNESS:g}"}
    programs = {}
    for name in SERVERS:
        command = [sys.executable, "-m", "tests.cut_off", name]
        programs[name] = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    yield programs
    for program in programs.values():
        program.kill()
        program.wait()


@pytest.mark.parametrize("name", SERVERS)
def test_a_client_whose_network_drops_everything(
    programs: dict[str, subprocess.Popen[str]], name: str
) -> None:
    """The server closes its connection, and meanwhile serves the others. Afterwards, the client comes back.

    Every payload with a receipt arrives. Without acknowledgements, that does not hold for the payloads that
    the server wrote to the consumer before it closed the connection.
    """
    output, _ = programs[name].communicate()
    found = re.fullmatch(r"(\d+) echoed, (\d+) lost, (\d+) twice\n", output)
    assert found, output
    echoed, lost, twice = map(int, found.groups())
    assert echoed > 40
    if name in WITH_ACKS:
        assert lost == 0
    else:
        assert twice == 0
