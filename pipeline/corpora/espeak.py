"""Settings and a seed in, a labelled synthetic corpus out: keywords and sentences in many voices of espeak-ng.

Everything is known exactly: the text, every phone's samples, the speaker, the keyword. The voices of train, dev and test
differ in their variant (the shape of the vocal tract), so a test voice was never heard. Within a voice each utterance
has its own rate, pitch, level, silence and noise, drawn from a generator seeded by (seed, utterance): an utterance does
not depend on how many there are, in which order they are made, or by how many processes. Speaking styles shift those of
the sentences, in turn; nobody feels anything here, but a style is heard in what emotion is heard in, and stands in its place.
"""

from collections.abc import Iterator
from hashlib import sha256
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64
from pydantic import BaseModel, Field

from cache.children import Child
from cache.children import Line as Wire
from cache.errors import ResourceError, SettingsError
from cache.frames import FIELD, RATE_HZ
from pipeline.audio import Decoded, to_int16
from pipeline.corpora.drawn import DrawnTrials
from pipeline.corpora.espeak_library import ESPEAK_HZ, SILENCE, Speech, known_variants, speak
from pipeline.corpora.item import Item
from pipeline.corpora.sentences import sentences
from pipeline.corpora.splits import Fractions, split_together
from pipeline.resample import resample

LINES_AHEAD = 32  # per process: they wait in its pipe, which holds some hundred
HEADROOM_DB = 6  # espeak-ng speaks at full scale; the noise needs room


class VoiceGroup(BaseModel, frozen=True, extra="forbid"):
    """The voices of one split."""

    count: int = Field(ge=0)
    variants: tuple[str, ...] = Field(min_length=1)
    """Variants of espeak-ng, taken in turn; each comes with several accents when there are more voices than variants."""


class VoiceGroups(BaseModel, frozen=True, extra="forbid"):
    """Who speaks in which split."""

    train: VoiceGroup
    dev: VoiceGroup
    test: VoiceGroup


class Style(BaseModel, frozen=True, extra="forbid"):
    """How a style differs from the voice as it is, on average; the jitter of each utterance comes on top."""

    rate: float = Field(ge=0.5, le=2)
    """Times the voice's words per minute."""
    pitch: int = Field(ge=-50, le=50)
    """Added to the voice's pitch, on espeak-ng's scale of 0 to 99, at whose ends it stops."""
    range: int = Field(ge=-50, le=50)
    """Added to the range of pitch, 50: below is monotonous, above is lively."""
    level_db: float = Field(ge=-20, le=3)
    """Added to the level, in dB."""


PLAIN = Style(rate=1.0, pitch=0, range=0, level_db=0.0)


class EspeakParams(BaseModel, frozen=True, extra="forbid"):
    """A synthetic corpus."""

    kind: Literal["espeak"]
    """Made here, by espeak-ng."""
    seed: int = Field(ge=0)
    voices: VoiceGroups
    accents: tuple[str, ...] = Field(min_length=1)
    """Languages of espeak-ng: en, en-us, en-029, en-gb-scotland ..."""
    rate_wpm: tuple[int, int]
    """Slowest and fastest voice, in words per minute."""
    pitch: tuple[int, int]
    """Lowest and highest voice, on espeak-ng's scale of 0 to 99."""
    jitter: float = Field(ge=0, le=1)
    """How much a voice varies: 1 is 20 % of its rate, 15 of pitch, 30 of range, and levels down to 12 dB lower."""
    keywords: tuple[str, ...]
    repetitions: int = Field(ge=0)
    """Times that each voice says each keyword."""
    sentences_per_voice: int = Field(ge=0)
    silence_sec: tuple[float, float]
    """Least and most silence before, and again after, the words."""
    snr_db: tuple[float, float] | None
    """Least and most signal-to-noise ratio of the noise that is added; its colour varies from white to brown."""
    sid: Fractions | None
    """Parts of each voice's sentences that speaker identification holds back; no sentence is said twice."""
    styles: dict[str, Style]
    """Speaking styles by name, which stand for emotion (er): a voice's sentences take them in turn; {} leaves er out."""
    sv: DrawnTrials | None
    """Speaker verification: trials between sentences of the dev voices, and of the test voices; null leaves it out."""


class Voice(NamedTuple):
    """One speaker."""

    name: str
    split: str
    espeak: str
    rate_wpm: float
    pitch: float


class Line(NamedTuple):
    """One utterance to be said."""

    path: str
    voice: Voice
    text: str
    keyword: str | None
    tasks: dict[str, str]
    style: str | None


class Job(NamedTuple):
    """All that a process needs to make one utterance."""

    corpus: str
    params: EspeakParams
    line: Line


def espeak_items(corpus: str, params: EspeakParams, workers: int) -> Iterator[Item]:
    """Make the corpus, utterance by utterance, in a fixed order.

    Raises:
        SettingsError: settings that cannot be obeyed, or no espeak-ng; the message names the way out.
    """
    check(params)
    if workers <= 1:
        yield from (make(Job(corpus, params, line)) for line in script(params))
        return
    children: list[Child] = []
    try:
        children += [Child(say_lines, (corpus, params), [], "process that speaks") for _ in range(workers)]
        asked = given = 0
        for line in script(params):  # utterance k is said by process k mod workers, so they come in order
            children[asked % workers].send(line)
            asked += 1
            if asked - given == workers * LINES_AHEAD:
                yield children[given % workers].recv()
                given += 1
        for number in range(given, asked):
            yield children[number % workers].recv()
    except ResourceError as error:
        raise ResourceError(f"{error}; run the command again with a smaller prepare.workers") from error
    finally:
        for child in children:
            child.kill()


def say_lines(wire: Wire, corpus: str, params: EspeakParams) -> None:
    """A process: lines in, utterances out, until the parent hangs up."""
    while True:
        wire.send(make(Job(corpus, params, wire.recv())))


def check(params: EspeakParams) -> None:
    """Refuse settings before the first utterance."""
    known = known_variants()
    for split, group in params.voices:
        if unknown := [v for v in group.variants if v not in known]:
            raise SettingsError(
                f"voices.{split}.variants: {unknown[0]!r} is not one of espeak-ng's: {', '.join(known)}"
            )
        if group.count > len(group.variants) * len(params.accents):
            raise SettingsError(
                f"voices.{split}.count is {group.count}, but {len(group.variants)} variants and {len(params.accents)} "
                "accents make no more than their product; add variants or accents"
            )
    train, dev, test = (set(group.variants) for _, group in params.voices)
    if shared := sorted(train & dev | train & test | dev & test):
        raise SettingsError(f"voices: the variant {shared[0]!r} is in two splits; give each split its own")
    for name in ("rate_wpm", "pitch", "silence_sec", "snr_db"):
        pair = getattr(params, name)
        if pair is not None and pair[0] > pair[1]:
            raise SettingsError(f"{name} is {list(pair)}: the first is the lower")
    if params.rate_wpm[0] < 80 or params.rate_wpm[1] > 350:
        raise SettingsError(
            f"rate_wpm is {list(params.rate_wpm)}; espeak-ng speaks from 80 to 350 words per minute here"
        )
    if params.pitch[0] < 0 or params.pitch[1] > 99 or params.silence_sec[0] < 0:
        raise SettingsError("pitch lies in 0 to 99 and silence_sec is not negative")
    if len(params.styles) == 1 or (params.styles and params.sentences_per_voice % len(params.styles)):
        raise SettingsError(
            f"styles: {len(params.styles)} cannot share {params.sentences_per_voice} sentences_per_voice evenly in two or "
            "more; change one of the two numbers"
        )
    for name, style in params.styles.items():
        if params.rate_wpm[0] * style.rate < 80 or params.rate_wpm[1] * style.rate > 350:
            raise SettingsError(
                f"styles.{name}.rate is {style.rate:g}, which takes rate_wpm {list(params.rate_wpm)} out of 80 to 350"
            )
    if len(set(params.keywords)) < len(params.keywords):
        raise SettingsError(f"keywords: {list(params.keywords)} names one twice")


def voices(params: EspeakParams) -> list[Voice]:
    """All voices, train before dev before test."""
    found: list[Voice] = []
    for split, group in params.voices:
        first = len(found)
        for i in range(group.count):
            turn, place = divmod(i, len(group.variants))
            variant = group.variants[place]
            accent = params.accents[(first + place + turn) % len(params.accents)]  # another one in every turn
            number = first + i
            # multiples of irrational numbers fill the plane of rate and pitch evenly, however many voices there are
            rate = spread(params.rate_wpm, number * 0.7549)
            pitch = spread(params.pitch, number * 0.5698)
            found.append(Voice(f"spk{number:02d}", split, f"{accent}+{variant}", rate, pitch))
    return found


def count_lines(params: EspeakParams) -> int:
    """Utterances of the corpus."""
    speakers = sum(group.count for _, group in params.voices)
    return speakers * (len(params.keywords) * params.repetitions + params.sentences_per_voice)


def spread(bounds: tuple[int, int], place: float) -> float:
    """The point of an interval at the fractional part of `place`."""
    return bounds[0] + (bounds[1] - bounds[0]) * (place % 1.0)


def script(params: EspeakParams) -> list[Line]:
    """Who says what: of each voice first its keywords, then its sentences, which are for every other task."""
    styles = list(params.styles)
    lines = []
    speakers = voices(params)
    per_voice = params.sentences_per_voice
    texts = sentences(per_voice * len(speakers), params.seed)
    for number, voice in enumerate(speakers):
        for keyword in params.keywords:
            for i in range(params.repetitions):
                path = f"{voice.name}/{keyword}-{i}"
                lines.append(Line(path, voice, keyword, keyword, {"kws": voice.split}, None))
        said = {f"{voice.name}/s{i:03d}": texts[number * per_voice + i] for i in range(per_voice)}
        sid = split_together(said, params.sid) if params.sid is not None else {}
        # the splits by voice: no test voice was heard, and no sentence is said twice
        by_voice = ["pr", "asr"] + ["sv"] * (params.sv is not None) + ["er"] * bool(styles)
        for i, (path, text) in enumerate(said.items()):
            tasks = dict.fromkeys(by_voice, voice.split) | ({"sid": sid[path]} if path in sid else {})
            lines.append(Line(path, voice, text, None, tasks, styles[i % len(styles)] if styles else None))
    return lines


def make(job: Job) -> Item:
    """Say one utterance and put it into its surroundings."""
    params, line = job.params, job.line
    generator = np.random.default_rng(list(sha256(f"{params.seed}/{line.path}".encode()).digest()))
    around = params.jitter * generator.uniform(-1, 1, size=4)
    style = params.styles[line.style] if line.style is not None else PLAIN
    speech = speak(
        line.voice.espeak,
        line.text,
        rate_wpm=round(line.voice.rate_wpm * style.rate * (1 + 0.2 * around[0])),
        pitch=int(np.clip(round(line.voice.pitch + style.pitch + 15 * around[1]), 0, 99)),
        pitch_range=int(np.clip(round(50 + style.range + 30 * around[2]), 0, 99)),
    )
    level_db = 6 * (around[3] - params.jitter) - HEADROOM_DB + style.level_db
    words = resample(speech.wave.astype(np.float64) / 32_768, ESPEAK_HZ, RATE_HZ) * 10 ** (level_db / 20)
    before, after = (round(s * RATE_HZ) for s in generator.uniform(*params.silence_sec, size=2))
    wave = np.concatenate([np.zeros(before), words, np.zeros(max(after, FIELD - before - len(words)))])
    if params.snr_db is not None:
        snr = generator.uniform(*params.snr_db)
        noise = coloured_noise(len(wave), generator.uniform(0, 2), generator)
        wave += noise * np.sqrt(np.square(words).mean()) * 10 ** (-snr / 20)
    return Item(
        id=f"{job.corpus}/{line.path}",
        corpus=job.corpus,
        path=line.path,
        audio=Decoded(to_int16(wave), ESPEAK_HZ, len(speech.wave), 0),
        split=line.voice.split,
        tasks=line.tasks,
        speaker=line.voice.name,
        text=line.text,
        phones=phones_at(speech, before, len(wave)),
        keyword=line.keyword,
        emotion=line.style,
    )


def phones_at(speech: Speech, before: int, samples: int) -> tuple[tuple[str, int, int], ...]:
    """Phones in samples of the finished waveform: without gaps, from the first sample to the last."""
    starts = [(SILENCE, 0)] + [(s, before + round(at * RATE_HZ / ESPEAK_HZ)) for s, at in speech.phones]
    merged = [starts[0]]
    for symbol, start in starts[1:]:
        if symbol != SILENCE or merged[-1][0] != SILENCE:  # pauses in a row are one
            merged.append((symbol, start))
    if merged[-1][0] != SILENCE:
        merged.append((SILENCE, before + round(len(speech.wave) * RATE_HZ / ESPEAK_HZ)))
    ends = [start for _, start in merged[1:]] + [samples]
    return tuple((symbol, start, end) for (symbol, start), end in zip(merged, ends, strict=True) if end > start)


def coloured_noise(samples: int, slope: float, generator: np.random.Generator) -> Float64[np.ndarray, " S"]:
    """Noise of unit power whose power falls with frequency as 1/f^slope: 0 white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(generator.standard_normal(samples))
    hertz = np.fft.rfftfreq(samples, 1 / RATE_HZ)
    noise = np.fft.irfft(spectrum * np.maximum(hertz, 50.0) ** (-slope / 2), samples)  # flat below 50 Hz
    return noise / np.sqrt(np.square(noise).mean())
