"""The processes of one training: the environment of torchrun in, this process's place among them and sums over all out.

Every process plans all batches and computes its own share; what they exchange is the gradient, once a step, and the terms
of the loss. Gradients are added up by hand: `DistributedDataParallel` takes the mean over processes, which is not the mean
over frames, and insists that every parameter takes part in every step, which a student of chosen layers does not.
"""

import atexit
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cache.errors import DecantError, ResourceError
from pipeline.devices import choose_device

TO_TELL = timedelta(seconds=10)  # for the process that has an error to print it


class World(NamedTuple):
    """Which of how many processes this is."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0


ALONE = World(0, 1)


@contextmanager
def join_world(device: str) -> Iterator[tuple[World, str]]:
    """Meet the other processes that torchrun started; gives this one's place and its device. Without torchrun: alone.

    An error within that several of them have, or that takes the others along, is raised by the first one that has it; the
    others end without a word, with the same exit code.

    Args:
        device: as a person types it: cpu, cuda, cuda:1, auto.

    Raises:
        SettingsError: a device that this machine does not have.
        ResourceError: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, choose_device(device)
        return
    with _others_needed():
        store, rank, size = next(dist.rendezvous("env://"))
    with _told_once(store):
        device = choose_device(device)
        cuda = device.startswith("cuda")
        if cuda:
            device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        with _others_needed():
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
        signal.signal(signal.SIGTERM, _end_in_time)
    try:
        with _told_once(store):  # before the group is left, which is an error to the others
            yield World(rank, size), device
    finally:
        dist.destroy_process_group()


def _end_in_time(number: int, _: FrameType | None) -> None:
    """The launcher stops all when one has gone: whoever is about to say what went wrong has time to, outside the loop, too."""
    timer = threading.Timer(TO_TELL.total_seconds(), os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


@contextmanager
def _told_once(store: dist.Store) -> Iterator[None]:
    try:
        yield
    except DecantError as error:
        try:
            is_first = store.add("errors", 1) == 1
            if is_first:
                atexit.register(store.set, "told", "")  # after the message is printed
            else:  # the launcher kills all when one has ended: not before the one that speaks has spoken
                store.wait(["told"], TO_TELL)
        except RuntimeError:  # the launcher has gone, or the one that was to speak
            is_first = os.environ["RANK"] == "0"
        if is_first:
            raise
        raise SystemExit(error.exit_code) from error


def wait_for_all(world: World) -> None:
    """Go on when every process is here.

    Raises:
        ResourceError: one has gone.
    """
    if world.size > 1:
        with _others_needed():
            dist.barrier()


def add_up(tensor: Tensor, world: World) -> Tensor:
    """The sum over processes, in place; the same bits in each.

    Raises:
        ResourceError: one has gone.
    """
    if world.size > 1:
        with _others_needed():
            dist.all_reduce(tensor)
    return tensor


def add_up_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """The sum over processes of every gradient that there is: the same parameters have one in each of them.

    Raises:
        ResourceError: one has gone.
    """
    if world.size == 1:
        return
    gradients: Sequence[Tensor] = [p.grad for p in parameters if p.grad is not None]
    flat = add_up(torch.cat([g.flatten() for g in gradients]), world)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def _others_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that torch.distributed raises, DistBackendError and DistNetworkError included
        raise ResourceError(
            f"another process of this training has gone or cannot be reached ({str(error).splitlines()[0]}); the same command "
            "goes on from the last saved state"
        ) from error
