"""Sources and their settings in; a manifest, a wave store with its receipt, trials, and a list of what was left out, out.

Recordings stream in a fixed order (sources by name, each in its own order): decoded by threads, written by this one, never
more than a few in memory. What cannot be used is quarantined by name; too much of it ends the run before anything is
published. What would leak from one split of a task into another leaves that task, and trials are drawn from what is left.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field

from cache.errors import DataError
from cache.frames import RATE_HZ
from cache.manifest import SPLITS, Manifest, Utterance
from cache.publish import write_json
from cache.receipts import make_receipt, store_key
from cache.waves import WaveWriter
from pipeline.audio import AudioParams, Decoded, Quarantine, decode
from pipeline.corpora.item import Declared, Item
from pipeline.corpora.sources import Source, count_of, drawn_trials_of, items_of, trials_of
from pipeline.corpora.trials import Kept, Trial, keep_known
from pipeline.ordered import ordered_map
from pipeline.tasks.leaks import Leak, without_leaks

DECODED_AHEAD = 8  # recordings per thread that wait, decoded, to be written
CorpusName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class PrepareParams(BaseModel, frozen=True, extra="forbid"):
    """What the manifest is made of."""

    sources: dict[CorpusName, Source] = Field(min_length=1)
    """Corpora by the name that their utterances' ids begin with."""
    audio: AudioParams
    max_bad_fraction: float = Field(ge=0, le=1)
    """The run fails if more than this part of the recordings is quarantined."""
    workers: int = Field(ge=1, le=256)
    """Threads that decode, and processes that speak; changes no sample."""


class Quarantined(NamedTuple):
    """One recording that is not used."""

    id: str
    path: str
    reason: str


class Prepared(NamedTuple):
    """What `prepare` made."""

    manifest: Manifest
    receipt: dict[str, Any]
    quarantined: tuple[Quarantined, ...]
    leaks: tuple[Leak, ...]
    """What left a task, or pretraining, because another split has the like."""
    trials: Kept


def count_recordings_of(params: PrepareParams) -> int:
    """About how many recordings the sources hold."""
    return sum(count_of(corpus, source) for corpus, source in params.sources.items())


def prepare(
    params: PrepareParams, stores: Path, quarantine: Path, tick: Callable[[float, str], None] | None = None
) -> Prepared:
    """Bring all sources into one wave store under `stores`, and list what was left out in `quarantine`.

    Raises:
        DataError: a source that cannot be read, an id that is there twice, too many recordings quarantined, or none left.
        ResourceError: the disk refuses, or a process that speaks was killed.
    """
    utterances: list[Utterance] = []
    quarantined: list[Quarantined] = []
    first_path: dict[str, str] = {}
    with WaveWriter(stores) as writer:
        for item, audio in decoded(params):
            if item.id in first_path:
                raise DataError(
                    f"{item.id} is there twice: {first_path[item.id]} and {item.path}; remove or rename one "
                    "(of a table: name a column of ids, columns.id)"
                )
            first_path[item.id] = item.path
            if isinstance(audio, Quarantine):
                quarantined.append(Quarantined(item.id, item.path, audio.reason))
            else:
                utterances.append(utterance_of(item, audio, writer.add(item.id, audio.wave)))
            if tick is not None:
                tick(1, item.corpus)
        write_json(quarantine, [row._asdict() for row in quarantined])
        refuse_too_many(quarantined, len(first_path), params.max_bad_fraction, quarantine)
        manifest, leaks = without_leaks(Manifest(tuple(utterances)))
        sources = sorted(params.sources.items())
        listed = keep_known((trial for source in sources for trial in trials_of(*source)), manifest.by_id)
        drawn = [trial for source in sources for trial in drawn_trials_of(*source, manifest)]
        trials = listed._replace(trials=(*listed.trials, *drawn))
        fingerprint = {"audio": manifest.audio_digest}
        place = writer.finish(store_key("waves", fingerprint), fingerprint)
    return Prepared(manifest, make_receipt(place, ["wave"]), tuple(quarantined), leaks, trials)


def decoded(params: PrepareParams) -> Iterator[tuple[Item, Decoded | Quarantine]]:
    """Every recording of every source, decoded, in order."""

    def load(item: Item) -> tuple[Item, Decoded | Quarantine]:
        if not isinstance(item.audio, Path):
            return item, item.audio
        return item, as_declared(item.declared, decode(item.audio, params.audio, item.part))

    with ThreadPoolExecutor(params.workers) as pool:
        for corpus, source in sorted(params.sources.items()):
            items = items_of(corpus, source, params.workers)
            yield from ordered_map(pool, load, items, params.workers * DECODED_AHEAD)


def as_declared(declared: Declared | None, audio: Decoded | Quarantine) -> Decoded | Quarantine:
    """The audio, unless its file is not what a list says: it was cut, resampled or replaced since."""
    if declared is None or isinstance(audio, Quarantine) or declared == (audio.rate_hz, audio.file_samples):
        return audio
    return Quarantine(
        f"the file has {audio.file_samples} samples at {audio.rate_hz} Hz, "
        f"and its list says {declared.file_samples} at {declared.rate_hz} Hz"
    )


def utterance_of(item: Item, audio: Decoded, digest: str) -> Utterance:
    """The row of the manifest."""
    return Utterance(
        id=item.id,
        corpus=item.corpus,
        path=item.path,
        samples=len(audio.wave),
        rate_hz=audio.rate_hz,
        file_samples=audio.file_samples,
        file_bytes=audio.file_bytes,
        audio=digest,
        split=item.split,
        tasks=item.tasks,
        speaker=item.speaker,
        text=item.text,
        phones=item.phones,
        keyword=item.keyword,
        emotion=item.emotion,
        pronunciation=item.pronunciation,
    )


def refuse_too_many(quarantined: list[Quarantined], total: int, max_bad_fraction: float, path: Path) -> None:
    """End the run where the quarantine is no longer an exception.

    Raises:
        DataError: over the fraction, or nothing is left; the message has the first and points to the others.
    """
    if not total:
        raise DataError("the sources hold no recordings; look at prepare.sources")
    bad = len(quarantined)
    if bad == total or bad > max_bad_fraction * total:
        first = quarantined[0]
        raise DataError(
            f"{bad} of {total} recordings cannot be used, more than prepare.max_bad_fraction = {max_bad_fraction:g} "
            f"allows; the first is {first.id}: {first.reason}; all are in {path}"
        )


def describe(manifest: Manifest) -> list[str]:
    """One line per corpus: utterances, hours, speakers, splits, tasks, and what er tells apart."""
    lines = []
    for corpus in dict.fromkeys(u.corpus for u in manifest):
        rows = [u for u in manifest if u.corpus == corpus]
        hours = sum(u.samples for u in rows) / RATE_HZ / 3600
        speakers = len({u.speaker for u in rows if u.speaker is not None})
        parts = [
            f"{len(rows):,} utterances, {hours:.2f} h, {speakers:,} speakers",
            counts(Counter(u.split for u in rows)),
        ]
        for task in sorted({task for u in rows for task in u.tasks}):
            parts.append(f"{task} {counts(Counter(u.tasks[task] for u in rows if task in u.tasks))}")
        if emotions := Counter(u.emotion for u in rows if u.emotion is not None):
            parts.append("labels of er: " + ", ".join(f"{name} {emotions[name]:,}" for name in sorted(emotions)))
        lines.append(f"{corpus}: {'; '.join(parts)}")
    return lines


def describe_trials(trials: Iterable[Trial]) -> list[str]:
    """One line per list: trials of one speaker, of two, and utterances."""
    lists: dict[str, list[Trial]] = {}
    for trial in trials:
        lists.setdefault(trial.list, []).append(trial)
    return [
        f"trials {name}: {sum(t.same for t in rows):,} of one speaker, {sum(not t.same for t in rows):,} of two, "
        f"{len({u for t in rows for u in (t.first, t.second)}):,} utterances"
        for name, rows in lists.items()
    ]


def counts(by_split: Counter[str]) -> str:
    """Such as `train 1,632, dev 408, test 544`."""
    return ", ".join(f"{split} {by_split[split]:,}" for split in SPLITS if by_split[split])
