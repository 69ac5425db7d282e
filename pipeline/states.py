"""The state of a training: a record and tensors in, a checked pair of files out, and back; a folder for one training.

A state is two files: the tensors, then a small JSON with their SHA-256. Without the JSON a state does not exist, so kill -9
while one is written leaves the one before; a state whose bytes have changed is passed over for the one before. Two are kept.
"""

import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cache.errors import StoreError
from cache.publish import digest_file, publish_file, read_json, write_json

KEPT = 2

Say = Callable[[str], None]


class State(NamedTuple):
    """What was saved."""

    record: dict[str, Any]
    """What JSON can hold."""
    tensors: dict[str, Any]
    """State dicts, on the CPU."""


def save_checked(directory: Path, step: int, record: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write the state of a step, with torch's random state, and drop those before the last `KEPT`."""
    name = f"state-{step:09d}"
    random = {
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with publish_file(directory / f"{name}.pt") as partial, open(partial, "wb") as file:
        torch.save(tensors | random, file)  # given a path it would hide what the disk refuses
    digest = digest_file(directory / f"{name}.pt")
    write_json(directory / f"{name}.json", record | {"sha256": digest})
    for old in _records(directory)[KEPT:]:
        old.unlink()  # the record first: tensors without one are no state
        old.with_suffix(".pt").unlink(missing_ok=True)


def load_checked(directory: Path, say: Say) -> State | None:
    """The newest intact state; None where there is none. See `restore_random`."""
    for record in _records(directory):
        tensors = record.with_suffix(".pt")
        try:
            described = read_json(record)
            intact = tensors.exists() and digest_file(tensors) == described["sha256"]
        except StoreError:
            intact = False
        if not intact:
            say(f"{tensors} is damaged (its SHA-256 differs) and is not used; going back to the state before it")
            continue
        return State(described, torch.load(tensors, map_location="cpu", weights_only=True))
    return None


def restore_random(state: State) -> None:
    """Let torch draw on where it was: after the modules are built, which draws too."""
    torch.set_rng_state(state.tensors["random"])
    if torch.cuda.is_available() and len(state.tensors["random_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state.tensors["random_cuda"])


def discard_other(run: Path, facts: dict[str, Any], device: str, say: Say) -> None:
    """Throw away the state of another training; say where this one goes on under other conditions.

    Args:
        run: the folder of states, whose file `lock` stays.
        facts: all that decides what the training computes, by name.
        device: cpu, cuda, cuda:1.
        say: told what was thrown away.
    """
    machine = {
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "cpu": platform.machine(),
    }
    try:
        before = read_json(run / "run.json")
    except StoreError:  # absent at the start; or a run was killed while it threw a state away
        before = {"facts": {}, "machine": machine}
    if changed := [name for name in facts if before["facts"].get(name) != facts[name]]:
        if list(run.glob("state-*")):
            say(f"{run} is of other {' and '.join(changed)}: thrown away, starting at step 0")
        discard(run)
    elif before["machine"] != machine:
        was = [f"{k} {before['machine'].get(k)}, now {v}" for k, v in machine.items() if before["machine"].get(k) != v]
        say(f"{run} was begun under other conditions ({', '.join(was)}): going on, but not bit for bit")
    write_json(run / "run.json", {"facts": facts, "machine": machine})


def discard(run: Path) -> None:
    """Empty the folder of a training, apart from the lock."""
    for path in run.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _records(directory: Path) -> list[Path]:
    """Records of states, newest first."""
    return sorted(directory.glob("state-*.json"), reverse=True)
