"""One audio file in, one mono 16 kHz int16 waveform out, or the reason why not.

libsndfile reads WAV, FLAC, Ogg, Opus and MP3, but it is silent about a truncated WAV and about NaN samples, and it would
unpack a day of silence from a small FLAC. So the header is held against the limits before anything is decoded, and what
was decoded is held against the header. Bad audio is data, not an accident: it comes back as a `Quarantine`.
"""

import struct
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import soundfile
from jaxtyping import Float64, Int16
from pydantic import BaseModel, Field

from cache.frames import FIELD, RATE_HZ
from pipeline.resample import MAX_FILTERS, num_filters, resample

MAX_CHANNELS = 8  # with max_sec, what bounds the memory of one file
RATES_HZ = range(4_000, 192_001)
PAST_ALL_SEC = 1e9  # no file is as long; a list may say 1e308, which times the rate is infinite
UNKNOWN_SIZE = (0, 0xFFFFFFFF)  # what a WAV header says when the audio was piped


class AudioParams(BaseModel, frozen=True, extra="forbid"):
    """What is done with recordings that are not mono 16 kHz."""

    max_sec: float = Field(gt=0, le=1_000)
    """Longer recordings are quarantined, by their header, before decoding."""
    channels: Literal["mean", "first", "refuse"]
    """Of several channels take the mean or the first, or quarantine the file."""
    rate: Literal["resample", "refuse"]
    """Resample what is not at 16 kHz, or quarantine it."""


class Decoded(NamedTuple):
    """A waveform ready for the store, and what its file was."""

    wave: Int16[np.ndarray, " S"]
    rate_hz: int
    file_samples: int
    file_bytes: int


class Quarantine(NamedTuple):
    """Why a recording is not used."""

    reason: str


class Part(NamedTuple):
    """What of a file is the recording, where it is not the whole."""

    start_sec: float
    end_sec: float | None
    """None: to the end of the file."""
    channel: int | None
    """From 0; None: as the settings treat all channels."""


def decode(path: Path, params: AudioParams, part: Part | None = None) -> Decoded | Quarantine:
    """Read one recording, or say why it is not used."""
    try:
        file_bytes = path.stat().st_size
        if file_bytes == 0:
            return Quarantine("the file is empty (0 bytes)")
        if fault := wav_fault(path):
            return Quarantine(fault)
        with soundfile.SoundFile(path) as file:
            if fault := header_fault(file, params, part):
                return Quarantine(fault)
            span = samples_of(part, file)
            if span.start:
                file.seek(span.start)
            as_stored = file.subtype == "PCM_16" and file.channels == 1 and file.samplerate == RATE_HZ
            samples = file.read(len(span), dtype="int16" if as_stored else "float64", always_2d=True)  # (S, channels)
            rate_hz, file_samples = file.samplerate, file.frames
    except soundfile.LibsndfileError as error:
        return Quarantine(f"cannot be decoded: {error.error_string}{looks_like(path)}")
    except FileNotFoundError:
        return Quarantine("the file does not exist")
    except OSError as error:
        return Quarantine(f"cannot be read: {error.strerror}")
    if len(samples) != len(span):
        return Quarantine(f"damaged: {len(samples)} of the {len(span)} samples its header promises")
    if part is not None and part.channel is not None:
        samples = samples[:, [part.channel]]
    if not as_stored and not np.isfinite(samples).all():
        return Quarantine(f"{np.count_nonzero(~np.isfinite(samples))} samples are NaN or infinite")
    wave = samples[:, 0] if as_stored else to_int16(resample(to_mono(samples, params), rate_hz, RATE_HZ))
    if len(wave) < FIELD:
        return Quarantine(f"too short: {len(wave)} samples at 16 kHz, one frame needs {FIELD}")
    return Decoded(np.ascontiguousarray(wave), rate_hz, file_samples, file_bytes)


def samples_of(part: Part | None, file: soundfile.SoundFile) -> range:
    """The samples of a file that are the recording, at the file's own rate."""
    if part is None:
        return range(file.frames)
    start, end = (None if t is None else round(min(t, PAST_ALL_SEC) * file.samplerate) for t in part[:2])
    return range(start or 0, file.frames if end is None else end)


def header_fault(file: soundfile.SoundFile, params: AudioParams, part: Part | None) -> str | None:
    """What the header alone forbids."""
    if file.samplerate not in RATES_HZ:
        return f"its rate of {file.samplerate} Hz is outside {RATES_HZ.start} to {RATES_HZ.stop - 1} Hz"
    if file.frames == 0:
        return "the file holds no samples"
    span = samples_of(part, file)
    if not 0 <= span.start < span.stop <= file.frames:
        start, end, seconds = (samples / file.samplerate for samples in (span.start, span.stop, file.frames))
        return f"its segment from {start:g} s to {end:g} s is not inside the {seconds:g} s of the file"
    if len(span) > params.max_sec * file.samplerate:
        return f"too long: {len(span) / file.samplerate:.1f} s, the setting max_sec is {params.max_sec:g}"
    if file.channels > MAX_CHANNELS:
        return f"{file.channels} channels, at most {MAX_CHANNELS} are read"
    if part is not None and part.channel is not None:
        if part.channel not in range(file.channels):
            return f"its channel {part.channel} is not among the {file.channels} of the file, counted from 0"
    elif file.channels > 1 and params.channels == "refuse":
        return f"{file.channels} channels, and the setting channels is refuse (mean and first are the others)"
    if file.samplerate != RATE_HZ and params.rate == "refuse":
        return f"{file.samplerate} Hz, and the setting rate is refuse (resample is the other)"
    if num_filters(file.samplerate, RATE_HZ) > MAX_FILTERS:
        return f"{file.samplerate} Hz has no small ratio to {RATE_HZ} Hz; is the header right?"
    return None


def to_mono(samples: Float64[np.ndarray, "S C"], params: AudioParams) -> Float64[np.ndarray, " S"]:
    """One channel out of several."""
    return samples[:, 0] if params.channels == "first" else samples.mean(axis=1)


def to_int16(wave: Float64[np.ndarray, " S"]) -> Int16[np.ndarray, " S"]:
    """Samples in [-1, 1] to 16 bits, rounded; what lies outside is clipped and never wraps around."""
    return np.clip(np.rint(wave * 32_768), -32_768, 32_767).astype(np.int16)


def wav_fault(path: Path) -> str | None:
    """What is wrong with the size of a WAV file's data chunk; None for other formats.

    libsndfile reads what is there of a truncated WAV and corrects the number of samples without a word.
    """
    with open(path, "rb") as file:
        magic = file.read(12)
        if magic[:4] not in (b"RIFF", b"RIFX", b"RF64") or magic[8:] != b"WAVE":
            return None
        claimed = data_chunk_bytes(file, magic[:4])
        here = path.stat().st_size - file.tell()
    if claimed is None:
        return "a WAV file without a data chunk"
    if claimed in UNKNOWN_SIZE and here > 0:
        return (
            "its WAV header does not say how long it is (it was piped?), so a missing end cannot be noticed; rewrite it"
        )
    if claimed > here:
        return f"truncated: {here} of the {claimed} bytes of audio that its WAV header promises"
    return None


def data_chunk_bytes(file: BinaryIO, magic: bytes) -> int | None:
    """Walk the chunks of a WAV file; leaves the file at the first byte of audio."""
    order = ">" if magic == b"RIFX" else "<"
    size_64 = None
    while len(head := file.read(8)) == 8:
        name, size = head[:4], struct.unpack(order + "I", head[4:])[0]
        if name == b"data":
            return size_64 if size_64 is not None and size == UNKNOWN_SIZE[1] else size
        if name == b"ds64" and len(body := file.read(16)) == 16:  # RF64 keeps its sizes here: riff, data
            size_64 = struct.unpack("<Q", body[8:])[0]
            size -= 16
        file.seek(size + size % 2, 1)  # chunks are padded to even sizes
    return None


def looks_like(path: Path) -> str:
    """A guess at what a file is that is no audio, for the message."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip().lower()
    return " (it is a web page)" if head.startswith((b"<!doctype", b"<html")) else ""
