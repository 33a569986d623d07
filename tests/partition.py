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

from tests.kit.constants import with_constants
from tests.kit.namespaces import ALONE, Cable
from tests.kit.servers import running
from tests.kit.storm import Storm
from tests.kit.waiting import TIMEOUT, until


async def main(seconds: float, **constants: int) -> None:
    with closing(Cable()) as cable, tempfile.TemporaryDirectory() as folder:
        cable.start_redis(folder)
        lesson = with_constants("lessons.redis_server", **constants)
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
        asyncio.run(main(float(sys.argv[2]), **{name: int(value) for name, value in settings}))
    else:
        sys.exit(subprocess.call([*ALONE, sys.executable, "-m", "tests.partition", "alone", *sys.argv[1:]]))
