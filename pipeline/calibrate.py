"""A sample of a layer's frames in, the tables its codec needs out.

int8 and mvq see channels of zero mean and unit variance: trained models have a few channels far larger than the rest,
which would take the whole range of a frame's scale. The codebooks of mvq are those of a direct-sum quantiser (a frame is
about the sum of one entry of each; Guo et al., Predicting Multi-Codebook Vector Quantization Indexes, 2022). The paper trains
them by gradient descent; here k-means of what is left over, codebook after codebook, is enough: fitting all of them again to
the codes (least squares) lowered the error of frames that were not in the sample by less than 1 % (M = 8; 3 % at M = 32).
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cache.codecs import CODEWORDS, Codec, Tables
from cache.errors import DataError, SettingsError
from cache.manifest import Manifest
from cache.ragged import Store
from pipeline.extraction.settings import Long
from pipeline.forward import forward_batches, mean_of
from pipeline.upstream import Upstream

STD_FLOOR = 0.01  # of the root mean square over channels: a silent channel must not decide a frame's scale
LLOYD_STEPS = 20
FRAMES_PER_CODEWORD = 4  # fewer than this and a codebook only learns its sample by heart
SAMPLE_BYTES = 2**31  # of layers held at a time


def sample_arrays(
    upstream: Upstream,
    manifest: Manifest,
    waves: Store,
    utterances: Sequence[int],
    arrays: Sequence[str],
    long: Long,
    batch_seconds: float,
    device: str,
) -> Iterator[tuple[str, Float[Tensor, "F D"]]]:
    """All frames of some utterances, array after array; as many arrays in one pass as fit into `SAMPLE_BYTES`."""
    num_frames = sum(manifest[u].num_frames for u in utterances)
    at_once = max(1, SAMPLE_BYTES // (4 * num_frames * upstream.width))
    for begin in range(0, len(arrays), at_once):
        some = arrays[begin : begin + at_once]
        held: dict[str, list[Tensor]] = {name: [] for name in some}
        for pieces, outputs in forward_batches(upstream, manifest, waves, utterances, long, batch_seconds, device):
            for name, frames in held.items():
                kept = mean_of(outputs, name)
                frames += [kept[b, piece.kept] for b, piece in enumerate(pieces)]
        for name in some:
            yield name, torch.cat(held.pop(name))


def fit_tables(frames: Float[Tensor, "F D"], codec: Codec, seed: int) -> Tables:
    """Channel statistics, and codebooks where the codec has them, of a sample on any device.

    Raises:
        DataError: the sample is not finite.
        SettingsError: it is too small.
    """
    if not codec.tables:
        return {}
    if not bool(frames.isfinite().all()):
        raise DataError(
            "the calibration sample has values that are not finite; set extract.codec: float32 and look at them"
        )
    if len(frames) < max(2, FRAMES_PER_CODEWORD * CODEWORDS * bool(codec.codebooks)):
        raise SettingsError(
            f"{len(frames)} frames are too few to fit {codec.name} to; raise extract.calibration.seconds "
            "(or there is too little audio: choose float16)"
        )
    wide = frames.double()
    mean, std = wide.mean(0), wide.std(0, correction=0)
    floor = STD_FLOOR * std.square().mean().sqrt()
    std = torch.where(std > floor, std, torch.where(floor > 0, floor, 1.0))
    tables = {"mean": mean.float(), "std": std.float()}
    if codec.codebooks:
        standard = (frames.float() - tables["mean"]) / tables["std"]
        tables["codebooks"] = fit_codebooks(standard, codec.codebooks, seed)
    return {name: table.cpu().numpy() for name, table in tables.items()}


def fit_codebooks(standard: Float[Tensor, "F D"], num: int, seed: int) -> Float[Tensor, "M 256 D"]:
    """Direct-sum codebooks: each clusters what those before it left over."""
    generator = torch.Generator().manual_seed(seed)
    left, books = standard.clone(), []
    for _ in range(num):
        book, nearest = _cluster(left, generator)
        left -= book[nearest]
        books.append(book)
    return torch.stack(books)


def _cluster(
    frames: Float[Tensor, "F D"], generator: torch.Generator
) -> tuple[Float[Tensor, "256 D"], Int64[Tensor, " F"]]:
    """Lloyd's k-means from drawn frames; an entry that nobody is nearest to stays where it is.

    Our own ten lines because scikit-learn's runs on the CPU only, and here the frames are on the device.
    """
    centres = frames[torch.randperm(len(frames), generator=generator)[:CODEWORDS].to(frames.device)].clone()
    for step in range(LLOYD_STEPS):
        nearest = torch.addmm(-centres.square().sum(-1) / 2, frames, centres.T).argmax(-1)
        if step + 1 < LLOYD_STEPS:
            sums = torch.zeros_like(centres).index_add_(0, nearest, frames)
            counts = torch.bincount(nearest, minlength=CODEWORDS)[:, None]
            centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres, nearest
