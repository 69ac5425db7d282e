"""Utterances and what becomes of long ones in; the pieces that go through a model, and padded batches of them, out.

Mostly a piece is an utterance. One that is longer than is allowed is cut into windows on the frame grid: each hears more
than is kept of it, so that a frame near a cut still has the context on both sides. Pieces and batches are a pure function
of the lengths: who runs them again meets the same ones.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cache.errors import DataError
from cache.frames import HOP, RATE_HZ, FrameSpan, num_frames
from cache.manifest import Manifest
from pipeline.extraction.settings import Chunk, Fail, Long


class Piece(NamedTuple):
    """A stretch of one utterance: what the model hears of it, and what is kept of that."""

    utterance: int
    """Its number in the manifest."""
    samples: slice
    """What is heard."""
    kept: slice
    """Frames of the piece that are kept."""
    first: int
    """The frame of the utterance that the first of them is."""

    @property
    def num_samples(self) -> int:
        """Samples that are heard."""
        return self.samples.stop - self.samples.start

    @property
    def num_kept(self) -> int:
        """Frames that are kept."""
        return self.kept.stop - self.kept.start


def longest_samples(long: Long) -> int:
    """Samples of the longest piece."""
    return int(long.max_sec * RATE_HZ)


def allowed(manifest: Manifest, long: Long) -> Manifest:
    """The utterances that go through the model, order kept.

    Raises:
        DataError: one is too long and the setting is to fail; or all are, and are to be skipped.
    """
    limit = longest_samples(long)
    if isinstance(long, Chunk) or int(manifest.samples.max()) <= limit:
        return manifest
    fits = manifest.up_to(long.max_sec)
    if isinstance(long, Fail):
        worst = max(manifest, key=lambda u: u.samples)
        raise DataError(
            f"{worst.id} has {worst.samples / RATE_HZ:.1f} s and {len(manifest) - len(fits)} utterances have more than "
            f"extract.long.max_sec {long.max_sec:g}; raise it, or set extract.long to {{kind: skip, ...}} or {{kind: chunk, ...}}"
        )
    if not len(fits):
        raise DataError(f"every utterance has more than extract.long.max_sec {long.max_sec:g} s; raise it")
    return fits


def pieces_of(utterance: int, samples: int, long: Long) -> Iterator[Piece]:
    """An utterance as one piece, or as the windows that a long one is cut into.

    Windows of n frames, of which o at each inner edge are heard and not kept, begin n - 2o frames apart; the last one
    ends where the utterance does, and hears the samples after its last frame, too.
    """
    frames = num_frames(samples)
    if not isinstance(long, Chunk) or samples <= longest_samples(long):
        yield Piece(utterance, slice(0, samples), slice(0, frames), 0)
        return
    window, overlap = long.window, long.overlap
    begin = first = 0
    while begin + window < frames:
        end = begin + window - overlap
        yield Piece(utterance, FrameSpan(begin, window).samples, slice(first - begin, end - begin), first)
        begin, first = end - overlap, end
    begin = frames - window
    yield Piece(utterance, slice(begin * HOP, samples), slice(first - begin, window), first)


def piece_batches(
    manifest: Manifest, utterances: Iterable[int], long: Long, batch_seconds: float
) -> Iterator[list[Piece]]:
    """All pieces by length, longest first, in batches of at most `batch_seconds` of padded audio."""
    budget = batch_seconds * RATE_HZ
    pieces = [piece for u in utterances for piece in pieces_of(u, manifest[u].samples, long)]
    batch: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (-p.num_samples, p.utterance, p.first)):
        if batch and (len(batch) + 1) * batch[0].num_samples > budget:
            yield batch
            batch = []
        batch.append(piece)
    yield batch
