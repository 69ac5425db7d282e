"""Run by Dask in each worker of the tests: what is to happen at a shard is read from the folder DECANT_TEST_HOOKS.

A file `3.kill` is for every time that shard 3 is made, `3.kill.once` for the first time alone.
"""

import os
import signal
import time
from pathlib import Path


def dask_setup(worker):
    from cache.errors import DataError
    from pipeline.extraction import task

    folder, fill_shard = Path(os.environ["DECANT_TEST_HOOKS"]), task.fill_shard

    def filled(upstream, job, waves, shard, *rest):
        with open(folder / "made", "a") as log:
            log.write(f"{shard} {os.getpid()}\n")
        for order in sorted(folder.glob(f"{shard}.*")):
            text = order.read_text()
            if order.suffix == ".once":
                order.unlink()
            match order.name.split(".")[1]:
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stop":
                    (folder / "stopped").write_text(str(os.getpid()))
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "bad":
                    raise DataError(text)
                case "defect":
                    raise RuntimeError(text)
                case "kill-other":
                    os.kill(int(text), signal.SIGKILL)
                    time.sleep(600)  # not for ever; whoever waits for this has ended, and the test ends us
                case "wait":
                    (folder / "waiting").write_text(str(os.getpid()))
                    time.sleep(600)
        fill_shard(upstream, job, waves, shard, *rest)

    task.fill_shard = filled
