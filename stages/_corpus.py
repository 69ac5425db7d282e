"""The paths of a manifest and of a receipt in, utterances and their waveforms out: of one `decant prepare`, or refused."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cache.manifest import Manifest
    from cache.ragged import Store


def open_corpus(manifest: Path, waves: Path, verify: bool | float = True) -> "tuple[Manifest, Store]":
    """Open both.

    Args:
        manifest: a manifest.
        waves: the receipt of its waveforms.
        verify: as `cache.receipts.open_receipt` has it.

    Raises:
        DataError: the manifest is damaged.
        StoreError: a file or the store is missing or damaged, or the waveforms are of other audio: same ids and lengths do not
            make them the same.
    """
    from cache.errors import StoreError
    from cache.manifest import read_manifest
    from cache.receipts import open_receipt

    utterances, store = read_manifest(manifest), open_receipt(waves, verify)
    if store.fingerprint.get("audio") != utterances.audio_digest:
        raise StoreError(
            f"{waves} is of other audio than {manifest}: they were not written by one `decant prepare`; run it again, or name "
            "the two that belong together"
        )
    return utterances, store
