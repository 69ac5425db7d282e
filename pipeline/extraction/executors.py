"""A number of workers and where they are to run in, a Dask client that has them out: this machine, a scheduler, or SLURM.

Dask is an extra: nothing here is imported for an extraction in one process.
"""

import logging
import math
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import dask
import torch
from pydantic import AfterValidator, BaseModel, Field

from cache.errors import SettingsError, StoreError
from pipeline.devices import choose_device
from pipeline.extras import from_extra

if TYPE_CHECKING:
    from dask_jobqueue import SLURMCluster
    from distributed import Client

THREADS = 2  # of a worker: one computes a shard while the other writes the last one
ONE_MACHINE = "127.0.0.1"
ASK_SEC = 10.0
SAME = "start scheduler and workers from an environment where the same version is installed"
OURS = "pipeline.extraction.task"  # preloaded, a worker is there when it can work, and an import does not hold up its heartbeat
QUIET = logging.CRITICAL  # what Dask says of workers that end, the driver says in a line


def _walltime(text: str) -> str:
    if not re.fullmatch(r"(\d+-)?\d{1,2}:\d{2}:\d{2}", text):
        raise ValueError("write it as HH:MM:SS or D-HH:MM:SS, in quotes")
    return text


class SlurmParams(BaseModel, frozen=True, extra="forbid"):
    """One SLURM job, which is one worker. None leaves a setting to the site's dask-jobqueue configuration."""

    queue: str | None
    """Partition."""
    account: str | None
    """Whom it is charged to."""
    cpus: int = Field(gt=0)
    """Cores of a worker."""
    memory: str
    """Of a worker, e.g. "32GB"."""
    gres: str | None
    """Accelerator, e.g. "gpu:1": one a worker. None for the CPU."""
    walltime: Annotated[str, AfterValidator(_walltime)]
    """HH:MM:SS after which SLURM kills the job."""
    margin_min: float = Field(ge=0)
    """Minutes before that, at least, in which a worker leaves by itself."""
    stagger_min: float = Field(ge=0)
    """Up to twice so many minutes earlier, drawn for each worker, so that they do not all leave at once."""
    interface: str | None
    """Network between driver and workers, e.g. "ib0"."""
    directives: tuple[str, ...]
    """More #SBATCH lines, e.g. "--exclude=node7"."""
    prologue: tuple[str, ...]
    """Lines of shell before the worker starts, e.g. "module load cuda"."""
    log_directory: str | None
    """Where SLURM writes what workers print."""

    @property
    def lifetime_sec(self) -> float:
        """Seconds that a worker lives, give or take the stagger.

        Raises:
            SettingsError: nothing is left of the wall time.
        """
        days, _, clock = self.walltime.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        total = 86_400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds
        left = total - 60 * (self.margin_min + self.stagger_min)
        if left <= 60 * self.stagger_min:
            raise SettingsError(
                f"slurm.walltime {self.walltime} leaves a worker no time after margin_min {self.margin_min:g} and stagger_min "
                f"{self.stagger_min:g}; ask for more"
            )
        return left


@contextmanager
def hire(
    executor: str, workers: int | None, threads: int | None, scheduler: str, slurm: SlurmParams | None, device: str
) -> Iterator["Client"]:
    """Workers as the command line asks for them.

    Raises:
        SettingsError: options that contradict each other; see also the functions below.
    """
    if scheduler and executor != "dask":
        raise SettingsError(f"--scheduler {scheduler} goes with --executor dask, not {executor}")
    if scheduler and workers is not None:
        raise SettingsError(f"--workers is {workers} and {scheduler} has its own; leave one of the two out")
    if device not in ("auto", "cpu", "cuda"):
        raise SettingsError(f"--device {device} names one GPU, and each worker has its own; choose cpu, cuda or auto")
    if slurm is not None:
        hired = slurm_workers(slurm, workers)
    elif scheduler:
        hired = running_scheduler(scheduler)
    else:
        hired = local_workers(workers, choose_device(device), threads)
    with hired as client:
        yield client


@contextmanager
def local_workers(workers: int | None, device: str, threads: int | None) -> Iterator["Client"]:
    """Processes on this machine: one a GPU, which sees no other, or any number on the CPU.

    Args:
        workers: how many; None is one for each GPU.
        device: cpu or cuda.
        threads: of the arithmetic of each; None shares the cores.

    Raises:
        SettingsError: more workers than GPUs, or the extra is not installed.
    """
    distributed = from_extra("distributed", "dask")
    visible = visible_gpus() if device == "cuda" else None
    if workers is None and visible is None:
        raise SettingsError("how many processes on the CPU? set --workers")
    count = len(visible or ()) if workers is None else workers
    if visible is not None and count > len(visible):
        raise SettingsError(f"--workers is {count} and there are {len(visible)} GPUs; there is one worker a GPU")
    threads = threads or max(1, len(os.sched_getaffinity(0)) // count)
    preload = dask.config.get("distributed.worker.preload")  # a person's own, one or several
    preload = [*([preload] if isinstance(preload, str) else preload), OURS]
    specs = {}
    for number in range(count):
        environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        if visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible[number]
        # memory_limit 0: Dask would give each worker its share of the cores' memory and kill it at 95 % of that
        options = {
            "nthreads": THREADS,
            "memory_limit": 0,
            "env": environment,
            "host": ONE_MACHINE,
            "silence_logs": QUIET,
            "preload": preload,
        }
        specs[number] = {"cls": distributed.Nanny, "options": options}
    scheduler = {
        "cls": distributed.Scheduler,
        "options": {"host": ONE_MACHINE, "port": 0, "dashboard_address": f"{ONE_MACHINE}:0"},
    }
    with (
        distributed.SpecCluster(workers=specs, scheduler=scheduler, silence_logs=QUIET) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def running_scheduler(address: str) -> Iterator["Client"]:
    """The workers of a scheduler that somebody else started.

    Args:
        address: tcp://HOST:PORT, or the path of its scheduler file.

    Raises:
        StoreError: nobody answers there.
        SettingsError: the extra is not installed here, or Decant is not there.
    """
    distributed = from_extra("distributed", "dask")
    where = {"address": address} if "://" in address else {"scheduler_file": str(Path(address))}
    if "scheduler_file" in where and not Path(address).exists():
        raise SettingsError(f"--scheduler {address} is neither an address (tcp://HOST:PORT) nor a scheduler file")
    try:
        client = distributed.Client(**where, set_as_default=False)
    except (OSError, ValueError) as error:
        raise StoreError(f"no Dask scheduler answers at {address} ({error}); start one with `dask scheduler`") from None
    with client:
        _refuse_strangers(client, address)
        yield client


def _refuse_strangers(client: "Client", address: str) -> None:
    """A process that lacks Decant does not say so when it gets an order: a worker ends at once, with every part it is given.

    Raises:
        SettingsError: the scheduler or a worker lacks it.
    """
    if not client.run_on_scheduler(find_spec, "pipeline"):
        raise SettingsError(f"the scheduler at {address} cannot import Decant; {SAME}")
    asked = {
        worker: client.submit(
            find_spec, "pipeline", workers=[worker], pure=False, key=f"decant-is-there-{uuid.uuid4().hex}"
        )
        for worker in client.nthreads()
    }
    for worker, future in asked.items():
        with suppress(TimeoutError):  # it may be busy for an hour
            if not future.result(timeout=ASK_SEC):
                raise SettingsError(f"the worker at {worker} cannot import Decant; {SAME}")


@contextmanager
def slurm_workers(settings: SlurmParams, workers: int | None) -> Iterator["Client"]:
    """Jobs of SLURM, one worker each; one that ends is asked for again while there is work.

    Raises:
        SettingsError: no number, too short a wall time, or the extra is not installed.
    """
    if workers is None:
        raise SettingsError("how many SLURM jobs? set --workers")
    distributed = from_extra("distributed", "slurm")
    with slurm_cluster(settings) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        cluster.adapt(minimum_jobs=workers, maximum_jobs=workers)
        yield client


def slurm_cluster(settings: SlurmParams) -> "SLURMCluster":
    """The jobs, none of them submitted yet; `job_script()` is what SLURM will get."""
    gres = [] if settings.gres is None else [f"--gres={settings.gres}"]
    lifetime = ["--lifetime", f"{math.floor(settings.lifetime_sec)}s"]
    stagger = ["--lifetime-stagger", f"{math.floor(60 * settings.stagger_min)}s"]
    return from_extra("dask_jobqueue", "slurm").SLURMCluster(
        queue=settings.queue,
        account=settings.account,
        cores=THREADS,
        processes=1,
        job_cpu=settings.cpus,
        memory=settings.memory,
        walltime=settings.walltime,
        interface=settings.interface,
        log_directory=settings.log_directory,
        job_extra_directives=[*gres, *settings.directives],
        worker_extra_args=[*lifetime, *stagger, "--preload", OURS],
        job_script_prologue=[f"export OMP_NUM_THREADS={settings.cpus}", *settings.prologue],
    )


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for one GPU each, among those that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in named.split(",")][:count] if named else [str(number) for number in range(count)]
