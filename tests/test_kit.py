"""The tests' own tools work, however the tests are started."""

import json
import re
import subprocess
import sys

import pytest

from tests.kit.constants import with_constants
from tests.kit.root import ROOT
from tests.kit.servers import running

INTERRUPT_A_CLIENT = """
import asyncio
import signal
from contextlib import closing
from tests.kit.clients import produce
from tests.kit.commands import CONSUMER, SERVERS
from tests.kit.scripts import Script
from tests.kit.servers import running
from tests.kit.waiting import wait_for

with running(SERVERS["server.py"]) as server, closing(Script(server.url(CONSUMER))) as script:
    asyncio.run(produce(server, ["1"]))
    wait_for(lambda: script.lines == ["1"], "the payload")
    script.process.send_signal(signal.SIGINT)
    wait_for(lambda: script.process.poll() is not None, "the client to end")
"""


def test_ctrl_c_reaches_a_client_if_the_tests_run_in_the_background() -> None:
    """A shell starts `pytest &` with SIGINT ignored. What the tests start does not inherit that."""
    in_background = ["sh", "-c", '"$@" & wait $!', "sh"]
    subprocess.run([*in_background, sys.executable, "-c", INTERRUPT_A_CLIENT], cwd=ROOT, check=True)


def test_each_test_gets_a_port_of_its_own() -> None:
    """No port is given twice, by any of the processes that run the tests, although no server uses it yet."""
    ask = "from tests.kit.ports import free_port; print([free_port() for _ in range(50)])"
    asking = [
        subprocess.Popen([sys.executable, "-c", ask], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    given = [port for process in asking for port in json.loads(process.communicate()[0])]
    assert len(set(given)) == 200


def test_a_misspelled_constant_is_an_error() -> None:
    """Otherwise, the lesson would run as it is, and the test would show nothing."""
    command = with_constants("lessons.ack_server", SEND_TIME_OUT=1)
    with pytest.raises(AssertionError, match=r"lessons\.ack_server has no SEND_TIME_OUT"), running(command):
        pass


def test_no_test_file_imports_from_another_one() -> None:
    """Code that two of them need is in kit/. So each can be read alone.

    test_partitioned.py runs a part of the contract.
    """
    for path in (ROOT / "tests").glob("*.py"):
        imported = re.findall(r"^(?:from|import) tests\.(test_\w+)", path.read_text(), re.MULTILINE)
        assert imported == (["test_contract"] if path.stem == "test_partitioned" else []), path.name
