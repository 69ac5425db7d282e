"""The worst errors to listen to: the right recordings, whole or cut as told, inside the page, small, the same each time."""

import base64
import io
import re

import numpy as np
import pytest
import soundfile

from cache.errors import SettingsError
from cache.publish import read_json, write_json
from pipeline.report import listening, page
from pipeline.report.gather import gather
from pipeline.report.listening import ListenParams, clip, worst_errors
from pipeline.report.superb import SuperbParams
from stages.report import main
from tests.report_fixtures import write_run

BEST = ListenParams.model_validate({"model": {"kind": "best"}, "each": 2, "max_sec": 8.0})
SUPERB = SuperbParams.model_validate({"zero": {"kind": "model", "model": "log-mel"}, "thousand": {"kind": "best"}})


class Waves:
    """A wave store of tones: utterance 0004 is 440 Hz for a second, any other 880 Hz for three."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, utterance):
        self.asked.append(utterance)
        tone, seconds = (440, 1) if utterance.endswith("4") else (880, 3)
        time = np.arange(seconds * 16_000) / 16_000
        return (8000 * np.sin(2 * np.pi * tone * time)).astype(np.int16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return gather(**write_run(tmp_path_factory.mktemp("run")), superb=SUPERB)


def heard_in(data: str) -> tuple[np.ndarray, int]:
    head, _, body = data.partition(",")
    assert head == "data:audio/mpeg;base64"
    return soundfile.read(io.BytesIO(base64.b64decode(body)))


def test_a_clip_sounds_as_its_recording():
    wave = Waves()("0004")
    made = clip("0004", wave, max_sec=8.0)
    samples, rate = heard_in(made.data)
    assert rate == 16_000
    assert (made.seconds, made.played) == (1.0, 1.0)
    assert len(samples) == pytest.approx(16_000, abs=1200)  # MP3 has frames of 576 samples
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) * rate / len(samples) == pytest.approx(440, abs=2)
    middle = samples[4000:12000]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(8000 / 32768 / np.sqrt(2), rel=0.05)


def test_a_long_recording_is_played_up_to_a_stated_length():
    made = clip("x", Waves()("x"), max_sec=0.5)
    assert (made.seconds, made.played) == (3.0, 0.5)
    assert len(heard_in(made.data)[0]) == pytest.approx(8000, abs=1200)


def test_a_clip_has_the_same_bytes_each_time_and_few_of_them():
    noise = (3000 * np.random.default_rng(0).normal(size=5 * 16_000)).astype(np.int16)
    one, two = clip("x", noise, 8.0), clip("x", noise, 8.0)
    assert one == two
    assert len(one.data) < 5 * 9000  # noise is the worst there is


def test_the_errors_are_those_of_the_best_student_and_each_recording_is_read_once(run):
    waves = Waves()
    heard = worst_errors(run, waves, BEST)
    assert heard.model == "distil"
    assert sorted(waves.asked) == ["espeak/0004", "espeak/0009"]
    assert [(miss.truth, miss.answer) for miss, _ in heard.misses["kws"]] == [("up", "off"), ("yes", "<go>")]
    assert {task: len(told) for task, told in heard.misses.items()} == {"kws": 2, "sid": 2}
    one = worst_errors(run, waves, BEST.model_copy(update={"each": 1}))
    assert [miss.ids for miss, _ in one.misses["kws"]] == [("espeak/0004",)]


def test_another_model_may_be_named_and_one_that_was_not_probed_is_refused(run):
    named = BEST.model_copy(update={"model": listening.Named(kind="model", model="hubert")})
    assert worst_errors(run, Waves(), named).model == "hubert"
    wrong = BEST.model_copy(update={"model": listening.Named(kind="model", model="huber")})
    with pytest.raises(SettingsError, match=r"report.listen.model.model is 'huber', which was not probed; .*hubert"):
        worst_errors(run, Waves(), wrong)


def test_more_errors_than_a_score_names_cannot_be_asked_for():
    with pytest.raises(ValueError, match="less than or equal to 8"):
        ListenParams.model_validate({"model": {"kind": "best"}, "each": 9, "max_sec": 8.0})


def test_the_page_has_players_that_ask_for_nothing_outside_it(run):
    text = page.html(run, worst_errors(run, Waves(), BEST.model_copy(update={"max_sec": 2.0})))
    players = re.findall(
        r'<audio controls preload="metadata" aria-label="([^"]+)" src="(data:audio/mpeg;base64,)', text
    )
    assert [label for label, _ in players[:2]] == ["espeak/0004", "espeak/0009, the first 2.0 s of 3.0"]
    assert len(players) == 4
    assert "media-src data:" in text
    assert "&lt;go&gt;" in text
    assert len(text) < 5_000_000
    assert "<audio" not in page.html(run)


def test_a_trial_has_two_players(run):
    miss = listening.MissFile(("a/1", "b/4"), "different", "same", 0.5)
    clips = [clip(name, Waves()(name), 1.0) for name in miss.ids]
    item = listening._item("sv", miss, clips)
    assert re.findall(r'aria-label="([^"]+)"', item) == ["a/1, the first 1.0 s of 3.0", "b/4"]
    assert "<i>are</i> different" in item
    assert "<i>taken for</i> same" in item


def test_a_task_without_an_error_says_so(tmp_path):
    paths = write_run(tmp_path)
    score = read_json(paths["probes"] / "distil-kws.json")
    write_json(paths["probes"] / "distil-kws.json", {**score, "misses": []})
    run = gather(**paths)
    assert "No error on test." in listening.section(run, worst_errors(run, Waves(), BEST))


def test_the_command_plays_what_the_wave_store_holds(tiny_corpus, tmp_path):
    paths = write_run(tmp_path / "run")
    for path in paths["probes"].glob("*.json"):
        write_json(path, {**read_json(path), "misses": [[["tiny/005"], "yes", "no", 0.9]]})
    listen = "listen: {model: {kind: model, model: small}, each: 1, max_sec: 8.0}"
    (tmp_path / "params.yaml").write_text(f"report: {{superb: null, {listen}}}\n")
    main(**{**paths, "waves": tiny_corpus.waves_path}, out=tmp_path / "out", params=tmp_path / "params.yaml")
    players = re.findall(r'aria-label="tiny/005" src="([^"]+)"', (tmp_path / "out" / "index.html").read_text())
    assert len(players) == 2
    samples, _ = heard_in(players[0])
    stored = tiny_corpus.waves.read("wave", "tiny/005")
    offset = np.argmax(np.correlate(samples[:6000], stored[:4000] / 32768, "valid"))
    aligned = samples[offset : offset + 20_000]
    assert np.corrcoef(aligned, stored[: len(aligned)])[0, 1] > 0.95
