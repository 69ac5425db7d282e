"""What is asked in speaker verification: trials are sorted by split, and what cannot be scored or leaks is refused."""

from dataclasses import replace

import numpy as np
import pytest

from cache.errors import DataError, SettingsError
from cache.manifest import Manifest
from pipeline.corpora.trials import Trial
from pipeline.tasks.labels import TASKS
from pipeline.tasks.run import job_of
from pipeline.tasks.voices import VoiceSplits, voice_splits
from tests.probe_fixtures import utterance
from tests.sv_fixtures import PARAMS, all_pairs

ROWS = [
    *[(f"t{n}", "train", f"anna{n % 2}") for n in range(4)],
    *[(f"d{n}", "dev", f"bert{n % 2}") for n in range(4)],
    *[(f"e{n}", "test", f"carl{n % 3}") for n in range(6)],
]


def manifest_of(rows=ROWS) -> Manifest:
    return Manifest(tuple(utterance(name, 20, {"sv": split}, speaker=who) for name, split, who in rows))


def sorted_out(manifest=None, trials=None, headline=None) -> VoiceSplits:
    manifest = manifest or manifest_of()
    return voice_splits(manifest, TASKS["sv"], all_pairs(manifest) if trials is None else trials, headline)


def test_speakers_train_and_trials_ask():
    splits = sorted_out()
    assert [name.split("/")[-1] for name in splits.names] == ["anna0", "anna1"]
    assert splits.train.ids == tuple(f"toy/t{n}" for n in range(4))
    assert splits.train.classes == (0, 1, 0, 1)
    assert (len(splits.dev), [(test.name, len(test)) for test in splits.tests]) == (6, [("toy/test", 15)])
    test = splits.tests[0]
    for (first, second), same, who in zip(test.pairs, test.same, test.speakers, strict=True):
        one, other = test.ids[first], test.ids[second]
        assert same == (int(one[-1]) % 3 == int(other[-1]) % 3) == (who[0] == who[1])
    assert len(splits.ids) == len(set(splits.ids)) == 14


def test_an_utterance_of_many_trials_and_lists_is_there_once():
    trials = all_pairs(manifest_of())
    twice = [
        *trials,
        *(t._replace(list="toy/again", first=t.second, second=t.first) for t in trials if t.first[4] == "e"),
    ]
    splits = sorted_out(trials=twice, headline="toy/test")
    assert [test.name for test in splits.tests] == ["toy/again", "toy/test"]
    assert splits.tests[splits.headline].name == "toy/test"
    assert len(splits.test_ids) == 6
    assert np.array_equal(splits.tests[0].pairs, splits.tests[1].pairs[:, ::-1])


def test_several_lists_need_one_to_be_named():
    trials = all_pairs(manifest_of())
    two = [*trials, *(t._replace(list="toy/hard") for t in trials if t.first[4] == "e")]
    with pytest.raises(
        SettingsError, match="`list` of task 'sv' is null, and there are several: choose one of toy/hard, toy/t"
    ):
        sorted_out(trials=two)
    with pytest.raises(
        SettingsError, match="`list` of task 'sv' is 'vox1-o', and that is none: choose one of toy/test"
    ):
        sorted_out(headline="vox1-o")


@pytest.mark.parametrize("pair", [("d0", "e0"), ("t0", "e0"), ("t0", "t2"), ("e0", "z")])
def test_a_trial_across_splits_or_about_training_is_refused(pair):
    manifest = Manifest((*manifest_of(), utterance("z", 20, {}, speaker="carl0")))
    first, second = (f"toy/{name}" for name in pair)
    same = manifest.by_id[first].speaker == manifest.by_id[second].speaker
    with pytest.raises(DataError, match="both must be dev or both test"):
        sorted_out(manifest, [*all_pairs(manifest_of()), Trial("toy/odd", same, first, second)])


def test_a_voice_on_two_sides_is_refused_before_anything_is_read():
    rows = [("t0", "train", "carl0") if row[0] == "t0" else row for row in ROWS]
    manifest = manifest_of(rows)
    with pytest.raises(DataError, match="toy/t0 is in train of 'sv' and has the same speaker as toy/e0"):
        job_of(TASKS["sv"], manifest, PARAMS, all_pairs(manifest))


def test_a_trial_that_the_speakers_contradict_is_refused():
    trials = list(all_pairs(manifest_of()))
    trials[0] = trials[0]._replace(same=not trials[0].same)
    with pytest.raises(
        DataError, match="says that toy/d0 and toy/d1 are one speaker, and the manifest says .*bert0 and .*bert1"
    ):
        sorted_out(trials=trials)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_side_without_trials_or_with_one_kind_only_is_refused(split):
    trials = all_pairs(manifest_of())
    with pytest.raises(DataError, match=f"task 'sv' has no {split} trials"):
        sorted_out(trials=[t for t in trials if t.list != f"toy/{split}"])
    with pytest.raises(DataError, match="trials of .* are of two speakers"):
        sorted_out(trials=[t for t in trials if t.list != f"toy/{split}" or not t.same])


def test_one_training_voice_is_nothing_to_tell_apart():
    with pytest.raises(DataError, match="one training speaker only"):
        sorted_out(
            Manifest(tuple(replace(u, speaker="anna") if u.tasks["sv"] == "train" else u for u in manifest_of()))
        )
