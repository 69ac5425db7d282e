"""Numbered parts of a job and a Dask client in, their answers out: who does what, and what becomes of those who fail.

The driver gives each worker its parts by name instead of leaving that to the scheduler, because only then is it known whose
death a part was at, and how long it has taken. A part whose worker ended, or did not answer in time, is given to another.
It is a suspect from then on: it has its worker to itself, so that it spoils no other part's record, and comes after the
others. When it has failed too often it is put aside, and named at the end.
"""

import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from distributed import CancelledError, Client, Future, KilledWorker, wait

from cache.errors import DecantError, ResourceError, SettingsError, StoreError
from pipeline.extraction.task import Refused

AT_ONCE = 2  # parts that a worker with two threads has: one is computed while the last one is written
LOOK_SEC = 0.5  # between looks at who is there, while nothing is answered
FETCH_SEC = 30.0  # for an answer of a few bytes, from a worker that has said it is there
RESTART_SEC = 60.0

Part = int


class Limits(NamedTuple):
    """When the driver loses patience."""

    deadline_sec: float
    """A worker that has work and has answered nothing for so long has hung."""
    attempts: int
    """Failures of one part after which it is put aside."""


class Lost(NamedTuple):
    """How a part failed for the last time."""

    kind: type[DecantError]
    why: str


@dataclass
class Hand:
    """A worker, as the driver sees it."""

    room: int
    """Parts that it may have at a time."""
    since: float = 0.0
    """When it last answered, or was given something after it had nothing."""
    held: dict[Part, Future] = field(default_factory=dict)


class Crew:
    """The workers of a client. After `run`, `lost` has the parts that were put aside."""

    def __init__(
        self,
        client: Client,
        limits: Limits,
        tell: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.client, self.limits = client, limits
        self.lost: dict[Part, Lost] = {}
        self._tell, self._clock = tell, clock
        self._hands: dict[str, Hand] = {}
        self._waits = False
        self._hung: set[str] = set()  # addresses that get nothing any more
        self._todo: deque[Part] = deque()
        self._suspects: set[Part] = set()
        self._failures: Counter[Part] = Counter()

    def run(
        self, work: Callable[..., Any], arguments: Callable[[Part], tuple[Any, ...]], parts: Iterable[Part]
    ) -> Generator[tuple[Part, Any], None, None]:
        """Have all parts done and give each answer as it comes, each once.

        Args:
            work: a function of an importable module; what it returns travels, so it is small.
            arguments: of one call, asked for when the part is given to a worker.
            parts: which, in order.

        Raises:
            DecantError: a worker refused in a way that all would.
            SettingsError: a worker has other code.
            StoreError: the scheduler is gone.
            ResourceError: no worker answers.
        """
        self._todo = deque(parts)
        self.lost, self._suspects, self._failures = {}, set(), Counter()
        try:
            while self._todo or any(hand.held for hand in self._hands.values()):
                self._muster()
                self._hand_out(work, arguments)
                yield from self._answers()
                self._give_up_the_late()
        finally:
            for hand in self._hands.values():
                for future in hand.held.values():
                    future.release()
                hand.held.clear()

    @property
    def busy(self) -> int:
        """Workers that have work."""
        return sum(bool(hand.held) for hand in self._hands.values())

    def _muster(self) -> None:
        """See who is there."""
        there = self._ask(self.client.nthreads)
        for address in [address for address in self._hands if address not in there]:
            self._take_back(address, ResourceError, "its worker ended; was it killed for its memory?")
        self._hung &= set(there)
        for address, threads in there.items():
            if address not in self._hands and address not in self._hung:
                self._hands[address] = Hand(max(1, min(AT_ONCE, threads)))
        if there and not self._hands:
            raise ResourceError(
                f"none of the {len(there)} workers at {self._address} answered in {self.limits.deadline_sec:g} s; "
                "start others or raise --deadline-sec, then run the same command again"
            )

    def _hand_out(self, work: Callable[..., Any], arguments: Callable[[Part], tuple[Any, ...]]) -> None:
        for address, hand in self._hands.items():
            while (part := self._next_for(hand)) is not None:
                if not hand.held:
                    hand.since = self._clock()
                hand.held[part] = self.client.submit(
                    work,
                    *arguments(part),
                    key=f"decant-{work.__name__}-{part}-{uuid.uuid4().hex}",
                    workers=[address],
                    pure=False,
                    retries=0,
                )

    def _next_for(self, hand: Hand) -> Part | None:
        if len(hand.held) >= hand.room or self._suspects & hand.held.keys():
            return None
        for number, part in enumerate(self._todo):
            if not hand.held or part not in self._suspects:
                del self._todo[number]
                return part
        return None

    def _answers(self) -> Generator[tuple[Part, Any], None, None]:
        """Wait a moment for answers; what failed goes back."""
        who = {future: (address, part) for address, hand in self._hands.items() for part, future in hand.held.items()}
        if not who:
            if not self._waits:
                self._tell(f"waiting for a worker at {self._address}")
            self._waits = True
            time.sleep(LOOK_SEC)
            return
        self._waits = False
        try:
            with self.client.as_current():
                done = wait(list(who), timeout=LOOK_SEC, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            return
        except CancelledError:
            raise self._gone() from None
        for future in done:
            address, part = who[future]
            hand = self._hands[address]
            alone = len(hand.held) == 1
            answer = self._read(future, address)
            del hand.held[part]
            hand.since = self._clock()
            if isinstance(answer, Refused) and answer.ends_run:
                raise answer.kind(answer.message)
            if isinstance(answer, Refused):
                self._failed(part, Lost(answer.kind, answer.message), counts=True)
            elif isinstance(answer, Lost):
                self._failed(part, answer, counts=alone or answer.kind is not ResourceError)
            else:
                yield part, answer

    def _read(self, future: Future, address: str) -> Any:
        """What a worker answered, or how that failed."""
        ended = Lost(ResourceError, "its worker ended before its answer was read")
        try:
            if future.status == "finished":
                return future.result(timeout=FETCH_SEC)
            error = future.exception(timeout=FETCH_SEC)
        except CancelledError:
            raise self._gone() from None
        except OSError:  # also a timeout
            return ended
        if isinstance(error, ImportError):
            raise SettingsError(f"the worker at {address} cannot run this: {error}; install the same Decant there")
        if error is None or isinstance(error, KilledWorker):
            return ended
        return Lost(DecantError, f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _give_up_the_late(self) -> None:
        """Take the work from workers that have hung, and have their nannies start others in their place."""
        now, limit = self._clock(), self.limits.deadline_sec
        late = [address for address, hand in self._hands.items() if hand.held and now - hand.since > limit]
        for address in late:
            self._tell(f"the worker at {address} answered nothing for {limit:g} s; its work goes to others")
            self._take_back(address, ResourceError, f"took more than --deadline-sec {limit:g}")
            self._hung.add(address)
        for address in late:
            # without a nanny a worker cannot be restarted (ValueError): it gets nothing more; KeyError: it has just ended
            with suppress(ValueError, KeyError):
                self._ask(partial(self.client.restart_workers, [address], timeout=RESTART_SEC, raise_for_error=False))

    def _take_back(self, address: str, kind: type[DecantError], why: str) -> None:
        """All that a worker had; only what it had alone is to blame."""
        held = self._hands.pop(address).held
        for part, future in held.items():
            future.release()
            self._failed(part, Lost(kind, why), counts=len(held) == 1)

    def _failed(self, part: Part, how: Lost, counts: bool) -> None:
        self._suspects.add(part)
        self._failures[part] += counts
        if self._failures[part] >= self.limits.attempts:
            self.lost[part] = how
        else:
            self._todo.append(part)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Ask the scheduler."""
        if self.client.status != "running":
            raise self._gone()
        try:
            return question()
        except OSError:
            raise self._gone() from None

    @property
    def _address(self) -> str:
        return str(self.client.scheduler.address) if self.client.scheduler else "its address"

    def _gone(self) -> StoreError:
        return StoreError(
            f"the Dask scheduler at {self._address} is gone, or was restarted; what is committed stays: "
            "see that one runs, and run the same command again"
        )
