"""A manifest and its wave store in, manifests of lhotse with FLAC files out.

The recordings are the utterances as the models hear them, mono at 16 kHz and sample for sample those of the store, so that
cached features and lhotse's cuts speak of the same frames. Paths are relative to the folder: read them in lhotse with
`load_manifest(FOLDER / "recordings.jsonl.gz").with_path_prefix(FOLDER)`.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import soundfile

from cache.errors import SettingsError, StoreError
from cache.frames import RATE_HZ
from cache.manifest import Manifest, Utterance
from cache.publish import publish_dir
from cache.ragged import Store

RECORDINGS, SUPERVISIONS = "recordings.jsonl.gz", "supervisions.jsonl.gz"
FILES_PER_FOLDER = 1_000


def export_lhotse(
    manifest: Manifest, waves: Store, out: Path, tick: Callable[[float, str], None] | None = None
) -> None:
    """Write the folder whole: audio, recordings and supervisions; a folder of an earlier export is replaced.

    Raises:
        SettingsError: there is such a folder, and it is not an earlier export.
        StoreError: the store lacks an utterance of the manifest, or has it in another length.
    """
    if out.exists() and not (out / RECORDINGS).is_file():
        raise SettingsError(f"{out} exists and holds no {RECORDINGS}, so it is not replaced; name another folder")
    with publish_dir(out) as partial:
        recordings, supervisions = [], []
        for number, utterance in enumerate(manifest):
            name = f"audio/{number // FILES_PER_FOLDER:04d}/{number:07d}.flac"
            write_flac(partial / name, utterance, waves)
            recordings.append(recording_of(utterance, name))
            supervisions.append(supervision_of(utterance))
            if tick is not None:
                tick(1, utterance.corpus)
        write_lines(partial / RECORDINGS, recordings)
        write_lines(partial / SUPERVISIONS, supervisions)


def write_flac(file: Path, utterance: Utterance, waves: Store) -> None:
    """The samples of one utterance."""
    if utterance.id not in waves.index:
        raise StoreError(f"the wave store has no {utterance.id}; it is of another manifest: run `decant prepare` again")
    wave = waves.read("wave", utterance.id)
    if len(wave) != utterance.samples:
        raise StoreError(
            f"{utterance.id}: the wave store has {len(wave)} samples but the manifest says {utterance.samples}; "
            "run `decant prepare` again"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, wave, RATE_HZ, format="FLAC", subtype="PCM_16")


def recording_of(utterance: Utterance, name: str) -> dict[str, Any]:
    """A line of recordings."""
    return {
        "id": utterance.id,
        "sources": [{"type": "file", "channels": [0], "source": name}],
        "sampling_rate": RATE_HZ,
        "num_samples": utterance.samples,
        "duration": utterance.samples / RATE_HZ,
        "channel_ids": [0],
    }


def supervision_of(utterance: Utterance) -> dict[str, Any]:
    """A line of supervisions: what lhotse has a name for under that, and the rest under `custom`."""
    custom = {
        "split": utterance.split,
        "tasks": utterance.tasks,
        "keyword": utterance.keyword,
        "emotion": utterance.emotion,
        "pronunciation": utterance.pronunciation,
    }
    row = {
        "id": utterance.id,
        "recording_id": utterance.id,
        "start": 0.0,
        "duration": utterance.samples / RATE_HZ,
        "channel": 0,
        "text": utterance.text,
        "speaker": utterance.speaker,
        "custom": {key: value for key, value in custom.items() if value is not None},
    }
    if utterance.phones is not None:
        phones = [[symbol, a / RATE_HZ, (b - a) / RATE_HZ, None] for symbol, a, b in utterance.phones]
        row["alignment"] = {"phone": phones}
    return {key: value for key, value in row.items() if value is not None}


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, compressed; the same rows give the same bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))
