"""The synthetic corpus: exact labels, voices kept apart, and the same bytes however it is made."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from cache.errors import DataError, SettingsError
from cache.manifest import Manifest, Utterance
from pipeline.corpora import espeak, espeak_library
from pipeline.corpora.drawn import draw_trials
from pipeline.corpora.espeak import (
    EspeakParams,
    Job,
    Line,
    Style,
    VoiceGroup,
    VoiceGroups,
    coloured_noise,
    count_lines,
    espeak_items,
    make,
    script,
    voices,
)
from pipeline.corpora.item import Item
from pipeline.corpora.sentences import VOCABULARY, sentences
from pipeline.corpora.splits import Fractions
from pipeline.prepare import PrepareParams
from pipeline.tasks.labels import TASKS
from pipeline.tasks.leaks import check, without_leaks

ROOT = Path(__file__).parents[1]

pytest.importorskip("espeakng_loader", reason='espeak-ng is not installed; pip install "decant[embedded]"')

PARAMS = EspeakParams(
    kind="espeak",
    seed=3,
    voices=VoiceGroups(
        train=VoiceGroup(count=3, variants=("m1", "f3")),
        dev=VoiceGroup(count=1, variants=("m5",)),
        test=VoiceGroup(count=2, variants=("croak", "f2")),
    ),
    accents=("en-us", "en", "en-gb-scotland"),
    rate_wpm=(130, 210),
    pitch=(25, 75),
    jitter=1.0,
    keywords=("yes", "no"),
    repetitions=2,
    sentences_per_voice=4,
    silence_sec=(0.05, 0.3),
    snr_db=(5.0, 30.0),
    sid=Fractions(dev=0.2, test=0.3),
    styles={},
    sv=None,
)


def changed(**settings) -> EspeakParams:
    return PARAMS.model_copy(update=settings)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return list(espeak_items("speech", PARAMS, workers=1))


def same(a: Item, b: Item) -> bool:
    return a.id == b.id and a.phones == b.phones and np.array_equal(a.audio.wave, b.audio.wave)


def test_two_processes_make_the_bytes_of_one(items):
    assert all(map(same, items, espeak_items("speech", PARAMS, workers=2)))


def test_an_utterance_alone_is_the_one_in_sequence_for_every_voice(items):
    lines = script(PARAMS)
    for number in range(len(items) - 1, -1, -3):  # and backwards
        assert same(make(Job("speech", PARAMS, lines[number])), items[number])


def test_more_voices_and_repetitions_change_no_utterance_that_was_there(items):
    more = changed(
        repetitions=3, voices=PARAMS.voices.model_copy(update={"test": VoiceGroup(count=3, variants=("croak", "f2"))})
    )
    lines = {line.path: line for line in script(more)}
    for item in items[::5]:
        assert same(make(Job("speech", more, lines[item.path])), item)


def test_the_seed_changes_the_sound_and_the_sentences(items):
    other = changed(seed=4)
    lines = script(other)
    assert [line.text for line in lines if line.keyword is None] != [i.text for i in items if i.keyword is None]
    assert not np.array_equal(make(Job("speech", other, lines[0])).audio.wave, items[0].audio.wave)


def test_repetitions_of_a_keyword_differ(items):
    yes = [i.audio.wave for i in items if i.speaker == "spk00" and i.keyword == "yes"]
    assert len(yes) == 2
    assert not np.array_equal(*(w[: min(map(len, yes))] for w in yes))


def test_every_utterance_has_its_labels(items):
    assert len(items) == count_lines(PARAMS) == 6 * (2 * 2 + 4)
    assert len({i.id for i in items}) == len(items)
    assert all(i.id == f"speech/{i.path}" and i.path.startswith(f"{i.speaker}/") for i in items)
    assert {i.keyword for i in items} == {"yes", "no", None}
    assert all(i.text == i.keyword for i in items if i.keyword)
    assert all(word in VOCABULARY for i in items if not i.keyword for word in i.text.split())


def test_speakers_and_voice_variants_are_in_one_split_each(items):
    by_split = {split: {i.speaker for i in items if i.split == split} for split in ("train", "dev", "test")}
    assert {split: len(s) for split, s in by_split.items()} == {"train": 3, "dev": 1, "test": 2}
    assert len(set.union(*by_split.values())) == 6
    variants = [{v.espeak.split("+")[1] for v in voices(PARAMS) if v.split == split} for split in by_split]
    assert len(set.union(*variants)) == sum(map(len, variants))
    assert all(i.tasks == {"kws": i.split} for i in items if i.keyword)


def test_speaker_identification_has_all_speakers_on_every_side_and_no_sentence_twice(items):
    said = [i for i in items if i.keyword is None]
    assert len({i.text for i in said}) == len(said)
    for split, each in (("train", 2), ("dev", 1), ("test", 1)):
        speakers = [i.speaker for i in said if i.tasks["sid"] == split]
        assert sorted(speakers) == sorted([f"spk{n:02d}" for n in range(6)] * each)
    assert not any("sid" in line.tasks for line in script(changed(sid=None)))


def test_phone_recognition_has_every_sentence_and_its_test_voices_are_in_no_other_split(items):
    assert all(("pr" in i.tasks) == (i.keyword is None) for i in items)
    speakers = {split: {i.speaker for i in items if i.tasks.get("pr") == split} for split in ("train", "dev", "test")}
    assert {split: len(names) for split, names in speakers.items()} == {"train": 3, "dev": 1, "test": 2}
    assert len(set.union(*speakers.values())) == 6


STYLES = {
    "neutral": Style(rate=1.0, pitch=0, range=0, level_db=0.0),
    "tired": Style(rate=0.8, pitch=-10, range=-30, level_db=-6.0),
}
STYLED = PARAMS.model_copy(update={"styles": STYLES})


def test_styles_take_turns_over_the_sentences_of_a_voice_and_are_what_er_tells_apart():
    lines = script(STYLED)
    assert [line._replace(style=None) for line in lines if line.keyword] == [
        line for line in script(PARAMS) if line.keyword
    ]
    said = [line for line in lines if not line.keyword]
    for voice in voices(STYLED):
        assert [line.style for line in said if line.voice == voice] == ["neutral", "tired"] * 2
    assert all(line.tasks["er"] == line.voice.split for line in said)
    assert not any("er" in line.tasks or line.style for line in script(PARAMS))


def test_without_styles_and_in_a_style_that_changes_nothing_the_bytes_are_the_same(items):
    lines = {line.path: line for line in script(STYLED)}
    plain = [i for i in items if not i.keyword and lines[i.path].style == "neutral"]
    assert len(plain) == 6 * 2
    for item in plain[::3]:
        styled = make(Job("speech", STYLED, lines[item.path]))
        assert same(styled, item)
        assert (item.emotion, styled.emotion) == (None, "neutral")
    tired = next(line for line in script(STYLED) if line.style == "tired")
    assert not same(make(Job("speech", STYLED, tired)), next(i for i in items if i.path == tired.path))


def test_a_style_shifts_what_the_voice_would_have_said(monkeypatch):
    asked = {}
    real = espeak_library.speak

    def listen(voice, text, **how):
        asked[style] = how
        return real(voice, text, **how)

    monkeypatch.setattr(espeak, "speak", listen)
    line = next(line for line in script(STYLED) if line.style == "tired")
    waves = {}
    for style in STYLES:
        steady = STYLED.model_copy(update={"jitter": 0.0, "snr_db": None})
        waves[style] = make(Job("speech", steady, line._replace(style=style))).audio.wave.astype(float)
    voice = line.voice
    rate, pitch = round(voice.rate_wpm), round(voice.pitch)
    assert asked["neutral"] == {"rate_wpm": rate, "pitch": pitch, "pitch_range": 50}
    assert asked["tired"] == {
        "rate_wpm": round(voice.rate_wpm * 0.8),
        "pitch": max(0, round(voice.pitch - 10)),
        "pitch_range": 20,
    }
    assert 1.1 < len(waves["tired"]) / len(waves["neutral"]) < 1.4
    loud = {style: np.sqrt(np.square(wave[wave != 0]).mean()) for style, wave in waves.items()}
    assert 20 * np.log10(loud["tired"] / loud["neutral"]) == pytest.approx(-6, abs=1.5)


def test_the_default_has_all_six_tasks_with_speakers_and_sentences_apart_and_trials():
    params = PrepareParams.model_validate(yaml.safe_load((ROOT / "params.yaml").read_text())["prepare"])
    (default,) = params.sources.values()
    lines = script(default)
    assert {task for line in lines for task in line.tasks} == {"kws", "pr", "asr", "sid", "sv", "er"}
    manifest = Manifest(tuple(row_of(line) for line in lines))
    assert without_leaks(manifest) == (manifest, ())
    for task in TASKS.values():
        check(manifest, task)
    for split in ("train", "dev", "test"):
        styles = Counter(line.style for line in lines if line.tasks.get("er") == split)
        assert set(styles) == set(default.styles)
        assert len(set(styles.values())) == 1, "classes are balanced in every split"
        texts = [line.text for line in lines if line.tasks.get("asr") == split]
        assert len(texts) == len(set(texts)) == 20 * len({line.voice for line in lines if line.voice.split == split})
    trials = draw_trials("espeak", manifest, default.sv)
    who = {u.id: u.speaker for u in manifest}
    for split, speakers in (("dev", 6), ("test", 8)):
        rows = [t for t in trials if t.list == f"espeak/{split}"]
        assert Counter(t.same for t in rows) == {True: 600, False: 600}
        assert len({who[t.first] for t in rows}) == speakers
        assert {manifest.by_id[u].tasks["sv"] for t in rows for u in (t.first, t.second)} == {split}


def row_of(line: Line) -> Utterance:
    """The line as `prepare` writes it, unsaid."""
    return Utterance(
        **{"id": f"espeak/{line.path}", "corpus": "espeak", "path": line.path, "samples": 16_000, "rate_hz": 22_050},
        **{"file_samples": 16_000, "file_bytes": 0, "audio": line.path, "split": line.voice.split, "tasks": line.tasks},
        **{"speaker": line.voice.name, "text": line.text, "keyword": line.keyword, "emotion": line.style},
    )


def test_voices_differ_and_stay_within_the_settings():
    many = voices(
        changed(voices=PARAMS.voices.model_copy(update={"train": VoiceGroup(count=6, variants=("m1", "f3"))}))
    )
    assert len({v.espeak for v in many}) == len(many) == 9  # every accent of every variant
    assert all(130 <= v.rate_wpm <= 210 and 25 <= v.pitch <= 75 for v in many)
    assert len({round(v.rate_wpm) for v in many}) > 6


def test_phones_cover_the_utterance_without_gaps_in_order(items):
    for item in items:
        assert item.phones[0][:2] == ("sil", 0)
        assert item.phones[-1][2] == len(item.audio.wave)
        assert all(a[2] == b[1] for a, b in zip(item.phones, item.phones[1:], strict=False))
        assert all(start < end for _, start, end in item.phones)
        assert not any(set("ˈˌ") & set(symbol) for symbol, _, _ in item.phones)


def test_phones_lie_where_the_sound_is():
    clean = changed(snr_db=None, jitter=0.0)
    line = next(line for line in script(clean) if line.keyword == "yes")
    item = make(Job("speech", clean, line))
    assert [p[0] for p in item.phones] == ["sil", "j", "ɛ", "s", "sil"]
    power = {symbol: np.square(item.audio.wave[a:b].astype(float)).mean() for symbol, a, b in item.phones[1:4]}
    assert power["ɛ"] > 3 * power["s"] > 0
    assert np.square(item.audio.wave[: item.phones[0][2] - 400].astype(float)).mean() < 1e-3 * power["ɛ"]
    hiss = item.audio.wave[slice(*item.phones[3][1:])].astype(float)
    vowel = item.audio.wave[slice(*item.phones[2][1:])].astype(float)
    crossings = [np.mean(np.diff(np.signbit(w)) != 0) for w in (hiss, vowel)]
    assert crossings[0] > 3 * crossings[1]


def test_nothing_is_clipped_and_noise_is_everywhere(items):
    for item in items:
        assert np.abs(item.audio.wave.astype(int)).max() < 32_767
        assert np.mean(item.audio.wave == 0) < 0.5
        assert (item.audio.rate_hz, item.audio.file_bytes) == (22_050, 0)


def test_noise_has_unit_power_and_the_asked_for_slope():
    noise = coloured_noise(2**16, 2.0, np.random.default_rng(0))
    assert np.square(noise).mean() == pytest.approx(1.0)
    power = np.square(np.abs(np.fft.rfft(noise)))
    octave = [power[2**k : 2 ** (k + 1)].mean() for k in (10, 12)]
    assert octave[0] / octave[1] == pytest.approx(16, rel=0.2)  # two octaves up: a 16th of the power


def test_espeak_itself_forgets_and_we_do_not():
    first = espeak_library.speak("en-us+croak", "down", 170, 50, 50)
    espeak_library.speak("en+f5", "something else altogether", 120, 80, 90)
    again = espeak_library.speak("en-us+croak", "down", 170, 50, 50)
    assert np.array_equal(first.wave, again.wave)
    assert first.phones == again.phones
    with espeak_library.fresh_espeak(), pytest.raises(DataError, match="held by something else in this process"):
        espeak_library.speak("en", "no", 170, 50, 50)


def test_settings_that_cannot_be_obeyed_are_refused_before_a_word_is_said():
    def refused(message: str, **settings) -> None:
        with pytest.raises(SettingsError, match=message):
            next(espeak_items("speech", changed(**settings), workers=1))

    def group(split: str, count: int, *variants: str) -> VoiceGroups:
        return PARAMS.voices.model_copy(update={split: VoiceGroup(count=count, variants=variants)})

    refused("voices.dev.variants: 'm99' is not one of espeak-ng's: .*croak", voices=group("dev", 1, "m99"))
    refused("voices.dev.count is 4, but 1 variants and 3 accents", voices=group("dev", 4, "m5"))
    refused("the variant 'croak' is in two splits", voices=group("dev", 1, "croak"))
    refused("no voice 'en-xx\\+m1'", accents=("en-xx", "en-yy"))
    refused("pitch is \\[75, 25\\]: the first is the lower", pitch=(75, 25))
    refused("rate_wpm is \\[20, 200\\]", rate_wpm=(20, 200))
    refused("pitch lies in 0 to 99", pitch=(0, 120))
    refused("styles: 1 cannot share 4", styles={"neutral": STYLES["neutral"]})
    refused("styles: 2 cannot share 5 sentences_per_voice", styles=STYLES, sentences_per_voice=5)
    fast = STYLES["neutral"].model_copy(update={"rate": 1.9})
    refused("styles.fast.rate is 1.9, which takes rate_wpm", styles={"fast": fast, "tired": STYLES["tired"]})
    refused("names one twice", keywords=("yes", "yes"))
    refused("sentences are asked for", sentences_per_voice=100_000)


def test_without_espeak_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(SettingsError, match=r'pip install --editable "\.\[embedded\]"'):
        next(espeak_items("speech", PARAMS, workers=1))


def test_a_path_too_long_for_espeak_is_named(monkeypatch):
    import espeakng_loader

    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: "/" + "x" * 160)
    with pytest.raises(DataError, match="longer than the 159 bytes espeak-ng can take"):
        next(espeak_items("speech", PARAMS, workers=1))


def test_sentences_are_different_and_a_larger_number_begins_with_the_same():
    some, more = sentences(200, seed=1), sentences(1_000, seed=1)
    assert more[:200] == some
    assert len(set(more)) == 1_000
    assert 300 < len(VOCABULARY) < 1_000
    assert {word for s in more for word in s.split()} <= VOCABULARY
    assert not any(f" a {vowel}" in f" {s}" for s in more for vowel in "aeiou")
    assert sentences(5, seed=2) != some[:5]
