"""An order and the workers of a Dask client in, the store brought up to date and its receipt out.

The coordinator: it holds the store's lock, has the codec fitted, gives the missing shards to workers, and is the only one that
renames and records what they wrote. Features never travel: a worker writes them to the disk that all share.
"""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from cache.errors import DataError, ResourceError, StoreError
from cache.receipts import make_receipt, store_root
from cache.tables import table_names
from cache.writer import StoreWriter, clear_partials
from pipeline.extract import Tick, open_job
from pipeline.extraction.crew import Crew, Lost
from pipeline.extraction.job import Job
from pipeline.extraction.settings import Keep
from pipeline.extraction.task import Described, Order, Written, device_of_worker, extract_shard, fit_on_worker

NAMED = 3  # shards that an error names


def order_of(job: Job, models: list[Path], manifest: Path, waves: Path, keep: Keep) -> Order:
    """What the driver tells workers of a job; paths become absolute, links in them stay: they may lead elsewhere there."""
    return Order(
        directory=str(job.directory.absolute()),
        stores=str(store_root().absolute()),
        models=tuple(str(model.absolute()) for model in models),
        manifest=str(manifest.absolute()),
        waves=str(waves.absolute()),
        params=job.params,
        keep=keep,
        device=job.device.split(":")[0],
        key=job.header["key"],
        fingerprint=job.header["fingerprint"],
    )


def extract_on(crew: Crew, order: Order, job: Job, tick: Tick) -> dict[str, Any]:
    """Bring a store up to date by workers, and give its receipt.

    Args:
        crew: the workers.
        order: what they are told.
        job: the same, here.
        tick: see `pipeline.extract.extract`.

    Raises:
        SettingsError, DataError, StoreError, ResourceError: see `Crew.run`; shards that failed too often, when all others
            are committed.
    """
    with open_job(job, tick) as (writer, committed):
        try:
            _fit(crew, order, writer)
            missing = writer.missing()

            def arguments(shard: int) -> tuple[Order, int, list[str], dict[str, Described]]:
                return order, shard, missing[shard], {array: _tables(writer, array) for array in missing[shard]}

            written: list[Written]
            with closing(crew.run(extract_shard, arguments, missing)) as made:
                for shard, written in made:
                    for file in written:
                        writer.adopt(file.array, shard, file.name, file.size, file.digest)
                        committed(file.array, shard)
        finally:
            clear_partials(job.directory)  # of workers that died, or finished what had gone to others
    if crew.lost:
        raise _explain(crew, job)
    return make_receipt(job.directory, job.arrays)


def _fit(crew: Crew, order: Order, writer: StoreWriter) -> None:
    """On a worker: the driver's machine may have no accelerator."""
    names = [name for name in writer.specs if writer.tables(name) is None]
    if not names:
        return
    for _, fitted in crew.run(fit_on_worker, lambda _: (order, names), [0]):
        for name, tables in fitted.items():
            writer.write_tables(name, tables)
    if crew.lost:
        kind, why = crew.lost[0]
        raise kind(f"fitting {order.params.codec} to {', '.join(names)} failed {crew.limits.attempts} times: {why}")


def _tables(writer: StoreWriter, array: str) -> Described:
    return {name: writer.journal.rows[name, 0] for name in table_names(writer.specs[array]).values()}


def device_of(crew: Crew, name: str) -> str:
    """What a device is on the first worker that comes; all others must have the same."""
    for _, device in crew.run(device_of_worker, lambda _: (name,), [0]):
        return str(device)
    raise crew.lost[0].kind(f"no worker could say its device: {crew.lost[0].why}")


def _explain(crew: Crew, job: Job) -> DataError | StoreError | ResourceError:
    """The shards that are not there, with their utterances."""
    lost = sorted(crew.lost.items())
    told = "; ".join(f"{_shard(job, shard)}: {how.why}" for shard, how in lost[:NAMED])
    more = f"; and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
    kind = _worst(how for _, how in lost)
    return kind(
        f"{len(lost)} of {job.plan.num_shards} shards failed {crew.limits.attempts} times each and all others are committed: "
        f"{told}{more}. The same command tries only these again; look at their recordings, or take them out of the manifest"
    )


def _worst(lost: Iterable[Lost]) -> type[DataError] | type[StoreError] | type[ResourceError]:
    kinds = {how.kind for how in lost}
    return DataError if DataError in kinds else StoreError if StoreError in kinds else ResourceError


def _shard(job: Job, shard: int) -> str:
    numbers = job.plan.utterances(shard)
    first, last = job.manifest[numbers[0]].id, job.manifest[numbers[-1]].id
    return (
        f"shard {shard} ({first} to {last}, {len(numbers)} utterances)"
        if len(numbers) > 1
        else f"shard {shard} ({first})"
    )
