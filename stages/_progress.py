"""Work done in, what a person sees out: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_SECONDS = 10.0  # seconds between lines where there is no terminal


@contextmanager
def progress(title: str, total: float, unit: str, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Give `tick(amount, note="", found=False)`: `amount` of `total` more is done, or was found done by an earlier run.

    On a terminal a bar with rate and time left; otherwise a line every ten seconds and one at the end. `quiet` for all but
    one of several processes that do the same work.
    """
    if quiet:
        yield lambda *_, **__: None
        return
    if sys.stdout.isatty():
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns) as bar:
            task = bar.add_task(title, total=total, unit=unit, rate="", note="")
            meter = _Meter(total)

            def tick(amount: float, note: str = "", found: bool = False) -> None:
                meter.add(amount, found)
                bar.update(task, advance=amount, rate=f"{meter.rate():,.0f} {unit}/s", note=note)

            yield tick
        return
    meter = _Meter(total)
    last = time.monotonic()

    def tick_plain(amount: float, note: str = "", found: bool = False) -> None:
        nonlocal last
        meter.add(amount, found)
        if time.monotonic() - last >= PLAIN_SECONDS:
            last = time.monotonic()
            print(f"{title}: {meter.line(unit)} {note}".rstrip(), flush=True)

    yield tick_plain
    print(f"{title}: {meter.line(unit)}", flush=True)


class _Meter:
    """Amount done and its rate; what was found done is no part of the rate."""

    def __init__(self, total: float) -> None:
        self.total, self.done, self.found = total, 0.0, 0.0
        self.start = time.monotonic()

    def add(self, amount: float, found: bool) -> None:
        self.done += amount
        if found:
            self.found += amount

    def rate(self) -> float:
        return (self.done - self.found) / max(time.monotonic() - self.start, 1e-9)

    def line(self, unit: str) -> str:
        if self.done == self.found:
            return f"{self.done:,.0f}/{self.total:,.0f} {unit}" + (", found done" if self.found else "")
        rate = self.rate()
        tail = f", {(self.total - self.done) / rate:,.0f} s left" if self.done < self.total else ""
        found = f", {self.found:,.0f} found done" if self.found else ""
        return f"{self.done:,.0f}/{self.total:,.0f} {unit} ({rate:,.0f}/s{tail}{found})"
