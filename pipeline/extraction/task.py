"""An order in, one shard of it in files on the shared disk out: what a worker process does, on whatever machine it runs.

The worker plans the job again from the paths in the order, and refuses if that is another store than the driver's. It
publishes nothing: what it writes lies beside its place under a name that nobody else has, until the driver, which holds the
store's lock, renames and records it. So any shard may be made twice, by a worker that was given up or after a lost answer.
"""

import os
import signal
import socket
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cache.codecs import CODECS, Tables
from cache.errors import DecantError, ResourceError, SettingsError, StoreError
from cache.manifest import read_manifest
from cache.publish import named_io_errors
from cache.ragged import Store
from cache.receipts import open_receipt
from cache.tables import describe_tables, read_tables, table_names
from cache.writer import write_partial
from cache.zarrshard import encode_shard, shard_path
from pipeline.calibrate import fit_tables, sample_arrays
from pipeline.devices import choose_device
from pipeline.extraction.job import Job, plan_job
from pipeline.extraction.settings import ExtractParams, Keep
from pipeline.extraction.shard import fill_shard
from pipeline.forward import draw_utterances
from pipeline.models import open_models
from pipeline.upstream import Upstream

Described = Mapping[str, tuple[int, str]]
"""Bytes and xxh3-128 of the tables of an array, by the names of their arrays."""


@dataclass(frozen=True)
class Order:
    """One extraction, as its driver tells it to workers. Paths are absolute, and name the same files everywhere."""

    directory: str
    """The store that is written."""
    stores: str
    """DECANT_STORE: where the waveforms lie."""
    models: tuple[str, ...]
    manifest: str
    waves: str
    params: ExtractParams
    keep: Keep
    device: str
    """cpu or cuda."""
    key: str
    fingerprint: dict[str, Any]


class Written(NamedTuple):
    """One array of one shard, whole and flushed."""

    array: str
    name: str
    """The file, in the folder where the shard belongs."""
    size: int
    digest: str
    """xxh3-128."""


class Refused(NamedTuple):
    """An error that a user can cause. It is returned: what is raised would go through the scheduler's own retries."""

    kind: type[DecantError]
    message: str
    ends_run: bool
    """Whether it would be met at every shard."""


@dataclass(frozen=True)
class Workshop:
    """An order with everything it names opened, once in a process."""

    order: Order
    upstream: Upstream
    job: Job
    waves: Store
    tables: dict[str, tuple[Described, Tables]] = field(default_factory=dict)


_opening = threading.Lock()
_computing = threading.Lock()  # one shard is computed while another thread writes the last one
_workshop: Workshop | None = None  # of the latest order


def dask_setup(_: Any) -> None:
    """Dask calls this in the workers of this machine before they take orders: Ctrl-C is for the driver, who ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def extract_shard(
    order: Order, shard: int, arrays: Sequence[str], tables: Mapping[str, Described]
) -> list[Written] | Refused:
    """Make one shard of some arrays.

    Args:
        order: the extraction.
        shard: its number in the plan.
        arrays: those that are not committed.
        tables: for each, what its tables must be, by bytes and hash.
    """
    try:
        shop = open_workshop(order)
    except DecantError as error:
        return Refused(type(error), f"{_here()}: {error}", ends_run=True)
    try:
        used = shop.job.plan.used_rows(shard)
        specs = [shop.job.specs[array] for array in arrays]
        rows = {spec.name: np.empty((used, *spec.inner), spec.dtype) for spec in specs}
        with _computing:
            fitted = {spec.name: _tables(shop, spec.name, tables[spec.name]) for spec in specs}
            fill_shard(shop.upstream, shop.job, shop.waves, shard, fitted, rows, lambda: None)
        written = []
        for spec in specs:
            place = shard_path(Path(order.directory), spec, shard)
            partial = place.with_name(f".{place.name}.{uuid.uuid4().hex}.partial")
            with named_io_errors(partial):
                size, digest = write_partial(partial, encode_shard(rows[spec.name], spec, shop.job.grid))
            written.append(Written(spec.name, partial.name, size, digest))
        return written
    except DecantError as error:
        return _refused(error)


def fit_on_worker(order: Order, arrays: Sequence[str]) -> dict[str, Tables] | Refused:
    """Fit the codec to some arrays: their tables."""
    try:
        shop = open_workshop(order)
    except DecantError as error:
        return Refused(type(error), f"{_here()}: {error}", ends_run=True)
    try:
        with _computing:
            return fit_arrays(shop, arrays)
    except DecantError as error:
        return _refused(error)


def fit_arrays(shop: Workshop, arrays: Sequence[str]) -> dict[str, Tables]:
    """Tables of some arrays, from the utterances that the settings draw.

    Raises:
        DataError: features that are not finite.
        SettingsError: too little audio.
    """
    job, params = shop.job, shop.job.params
    drawn = draw_utterances(job.manifest, params.calibration.seconds, params.calibration.seed)
    samples = sample_arrays(
        *(shop.upstream, job.manifest, shop.waves, drawn, arrays, params.long, params.batch_seconds, job.device)
    )
    return {name: fit_tables(frames, CODECS[params.codec], params.calibration.seed) for name, frames in samples}


def device_of_worker(name: str) -> str | Refused:
    """What "auto", or another device, is where this runs."""
    try:
        return choose_device(name)
    except DecantError as error:
        return Refused(type(error), f"{_here()}: {error}", ends_run=True)


def open_workshop(order: Order) -> Workshop:
    """Everything that the order names, opened now or for an earlier shard of it.

    Raises:
        StoreError: this process would make another store, or something is missing or damaged.
        DataError: the manifest is missing or wrong.
        SettingsError: a device that is not here.
    """
    global _workshop
    with _opening:
        if _workshop is None or _workshop.order != order:
            _workshop = None  # its model leaves the device before the next one comes
            os.environ["DECANT_STORE"] = order.stores
            device = choose_device(order.device)
            upstream = open_models([Path(model) for model in order.models], device)
            job = plan_job(upstream, read_manifest(Path(order.manifest)), order.params, order.keep, device)
            if job.header["key"] != order.key:
                here = job.header["fingerprint"]
                fields = sorted({*here, *order.fingerprint})
                other = [name for name in fields if here.get(name) != order.fingerprint.get(name)]
                raise StoreError(
                    f"would make the store {job.header['key']} where the driver makes {order.key}: "
                    f"{', '.join(other) or 'the format'} differs; give all workers the driver's code, models and disk"
                )
            _workshop = Workshop(order, upstream, job, open_receipt(Path(order.waves), verify=True))
        return _workshop


def _tables(shop: Workshop, array: str, want: Described) -> Tables:
    """What the codec of an array was fitted with, read again only if the driver means other tables than the last time."""
    held = shop.tables.get(array)
    if held is None or held[0] != want:
        spec, store = shop.job.specs[array], Path(shop.order.directory)
        if table_names(spec) and describe_tables(store, spec) != want:
            raise StoreError(
                f"{_here()}: the tables of {array} in {store} are not those that the driver wrote; is it the same disk?"
            )
        held = shop.tables[array] = (want, read_tables(store, spec))
    return held[1]


def _refused(error: DecantError) -> Refused:
    ends_run = isinstance(
        error, ResourceError | SettingsError
    )  # a full disk, a sample too small: not this shard's fault
    return Refused(type(error), str(error), ends_run)


def _here() -> str:
    return f"worker process {os.getpid()} on {socket.gethostname()}"
