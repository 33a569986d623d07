"""Cut the network between redis_server.py and Redis for some seconds, under load, and count what is lost.

`python -m tests.partition 45` does it in networks of its own, if the system (Linux) lets it have some, and
prints a line such as `2360 echoed, 0 lost, 2 twice`. `REDIS_TIMEOUT=2` behind it changes a constant of the
server.
"""

import asyncio
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

from tests.harness import ALONE, LOOPBACK_UP, TIMEOUT, redis_executable, running, until, wait_for
from tests.test_redis import Storm, shortened

OTHER_NETWORK = ["nsenter", "--net", "--target"]


def run(*command: str) -> None:
    subprocess.run(command, check=True)


class Cable:
    """A network with Redis, at the other end of a cable that can be pulled. Pulled, it drops all packets."""

    def __init__(self) -> None:
        run(sys.executable, "-c", LOOPBACK_UP)
        run("ip", "link", "add", "here", "type", "veth", "peer", "name", "there")
        self.holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        ours, theirs = Path("/proc/self/ns/net"), Path(f"/proc/{self.holder.pid}/ns/net")
        wait_for(lambda: ours.readlink() != theirs.readlink(), "a second network")
        run("ip", "link", "set", "there", "netns", str(self.holder.pid))
        run("ip", "address", "add", "10.9.0.1/24", "dev", "here")
        run("ip", "link", "set", "here", "up")
        self.there("ip", "address", "add", "10.9.0.2/24", "dev", "there")
        self.plug()

    def there(self, *command: str) -> None:
        run(*OTHER_NETWORK, str(self.holder.pid), *command)

    def start_redis(self, folder: str) -> None:
        options = ["--bind", "10.9.0.2", "--protected-mode", "no", "--save", "", "--dir", folder]
        command = [*OTHER_NETWORK, str(self.holder.pid), redis_executable(), *options]
        self.redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def plug(self) -> None:
        self.there("ip", "link", "set", "there", "up")

    def pull(self) -> None:
        self.there("ip", "link", "set", "there", "down")

    def close(self) -> None:
        for process in (self.redis, self.holder):
            process.kill()
            process.wait()


async def main(seconds: float, **constants: float) -> None:
    with closing(Cable()) as cable, tempfile.TemporaryDirectory() as folder:
        cable.start_redis(folder)
        lesson = shortened(Path(folder), **constants)
        with running(lesson, env={"REDIS_URL": "redis://10.9.0.2:6379/0"}) as server:
            storm = Storm([server, server])
            async with asyncio.TaskGroup() as group:
                group.create_task(storm.produce(0))
                await storm.flow()
                cable.pull()
                await asyncio.sleep(seconds)
                cable.plug()
                await storm.flow()
                storm.ending = True
            with suppress(AssertionError):
                await until(lambda: storm.echoed <= set(storm.received()), "the rest", seconds + 4 * TIMEOUT)
            received = Counter(storm.received())
            storm.close()
    lost = len(storm.echoed - set(received))
    twice = sum(count > 1 for count in received.values())
    print(f"{len(storm.echoed)} echoed, {lost} lost, {twice} twice")


if __name__ == "__main__":
    if sys.argv[1] == "alone":
        settings = [setting.split("=") for setting in sys.argv[3:]]
        asyncio.run(main(float(sys.argv[2]), **{name: float(value) for name, value in settings}))
    else:
        sys.exit(subprocess.call([*ALONE, sys.executable, "-m", "tests.partition", "alone", *sys.argv[1:]]))
