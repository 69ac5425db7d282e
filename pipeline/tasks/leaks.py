"""A manifest in, what its test could have heard before out: the utterances that leak, and the manifest without them.

A score says how a model does on what it never met, and what it must not have met depends on the task:

    kws, sv   voices                 a keyword in a voice of the training is another, easier question
    pr, asr   voices and sentences   a head can learn a sentence by heart
    er        voices                 in folds dev shares them with train, as in SUPERB: the test does not
    sid       recordings             its voices are the classes, so they are on every side; nobody says a sentence twice

and, of every task, the very samples. Pretraining and distillation have no labels, but they have voices: an utterance of
split `train` is never of a person whom a task above holds back, nor are they samples that any of them holds back. Speaker
identification is apart: pretraining hears its dev and test utterances like those of any training speaker, without a
label, and `decant prepare` says how many.

What is not known cannot be compared: without a speaker, or without words, only the samples are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from cache.errors import DataError
from cache.manifest import SPLITS, Manifest, Utterance
from pipeline.tasks.labels import Task, folds_of, whole_task

RANK = {split: rank for rank, split in enumerate(SPLITS)}  # of two sides, the one to be asked later keeps its utterance
PRETRAINING = "pretraining"


class Trait(NamedTuple):
    """What two utterances on two sides must not have in common."""

    name: str
    of: Callable[[Utterance], object]
    """None where it is not known."""


def sentence_of(utterance: Utterance) -> str | None:
    """The words in any case, or the phones where there are no words."""
    said = utterance.text or utterance.pronunciation
    return " ".join(said.casefold().split()) if said else None


def recording_of(utterance: Utterance) -> tuple[str, str] | None:
    """Who says what: a second copy of a recording, in another format perhaps, has the same."""
    person, sentence = utterance.person, sentence_of(utterance)
    return (person, sentence) if person is not None and sentence is not None else None


SAMPLES = Trait("samples", lambda utterance: utterance.audio)
PERSON = Trait("speaker", lambda utterance: utterance.person)
SENTENCE = Trait("sentence", sentence_of)
RECORDING = Trait("speaker and sentence", recording_of)

APART = {
    "kws": (SAMPLES, PERSON),
    "pr": (SAMPLES, PERSON, SENTENCE),
    "asr": (SAMPLES, PERSON, SENTENCE),
    "sv": (SAMPLES, PERSON),
    "er": (SAMPLES, PERSON),
    "sid": (SAMPLES, RECORDING),
}
"""By task, what its splits must not have in common; of a task that is not here, samples."""


class Leak(NamedTuple):
    """Two utterances that would let a score be better than the model is."""

    task: str
    """As in the manifest: `er-2`. Or `pretraining`, which hears what a task holds back."""
    kept: Utterance
    """The one that is held back."""
    leaves: Utterance
    """The one that must not be learned from, or chosen by, beside it."""
    sides: tuple[str, str]
    """Their splits."""
    trait: str
    """What they have in common."""


def leaks_of(manifest: Manifest, name: str) -> Iterator[Leak]:
    """The leaks between the splits of one task, by its name in the manifest: at most one an utterance, in order."""
    whole = whole_task(name)
    traits = APART.get(whole, (SAMPLES,))
    takes_part = [u for u in manifest if name in u.tasks]
    held = {trait.name: _latest(takes_part, trait, lambda u: u.tasks[name]) for trait in traits}
    for utterance in takes_part:
        side = utterance.tasks[name]
        for trait in traits:
            kept = held[trait.name].get(trait.of(utterance))
            if kept is None or RANK[kept.tasks[name]] <= RANK[side]:
                continue
            if trait is PERSON and name != whole and kept.tasks[name] == "dev":
                continue  # of folds, dev is drawn from what is not the test
            yield Leak(name, kept, utterance, (kept.tasks[name], side), trait.name)
            break


def heard_of(manifest: Manifest, names: Iterable[str]) -> Iterator[Leak]:
    """What pretraining and distillation learn from that these tasks hold back: at most one leak an utterance, in order."""
    held = _held_back(manifest, [name for name in names if whole_task(name) != "sid"])
    for utterance in manifest.select(split="train"):
        if (found := _found(utterance, held)) is not None:
            kept, trait = found
            yield Leak(PRETRAINING, kept, utterance, ("held back", "train"), trait.name)


def _held_back(manifest: Manifest, names: Iterable[str]) -> dict[Trait, dict[object, Utterance]]:
    """Of dev and test of all these tasks, the samples and, where a task wants unheard voices, the persons."""
    held: dict[Trait, dict[object, Utterance]] = {SAMPLES: {}, PERSON: {}}
    for name in names:
        back = [u for u in manifest if u.tasks.get(name) in ("dev", "test")]
        for trait in (SAMPLES, PERSON) if PERSON in APART.get(whole_task(name), ()) else (SAMPLES,):
            held[trait] = _latest(back, trait, lambda u: "test") | held[trait]
    return held


def _found(utterance: Utterance, held: dict[Trait, dict[object, Utterance]]) -> tuple[Utterance, Trait] | None:
    for trait, keepers in held.items():
        kept = keepers.get(trait.of(utterance))
        if kept is not None:
            return kept, trait
    return None


def _latest(rows: Iterable[Utterance], trait: Trait, side: Callable[[Utterance], str]) -> dict[object, Utterance]:
    """By each value of a trait, the first utterance of the latest side that has it."""
    found: dict[object, Utterance] = {}
    for utterance in rows:
        value = trait.of(utterance)
        if value is None:
            continue
        before = found.setdefault(value, utterance)
        if RANK[side(utterance)] > RANK[side(before)]:
            found[value] = utterance
    return found


def task_names(manifest: Manifest) -> list[str]:
    """Every task of a manifest, folds apart."""
    return sorted({name for utterance in manifest for name in utterance.tasks})


def without_leaks(manifest: Manifest) -> tuple[Manifest, tuple[Leak, ...]]:
    """The manifest in which nothing leaks, and what leaked.

    Of two utterances the one to be asked later stays: test before dev before train. The other one leaves the task. What
    pretraining must not hear becomes `test` there, and stays where it is in the tasks.
    """
    found = [leak for name in task_names(manifest) for leak in leaks_of(manifest, name)]
    left: dict[str, set[str]] = {}
    for leak in found:
        left.setdefault(leak.leaves.id, set()).add(leak.task)
    rows = [
        replace(u, tasks={k: v for k, v in u.tasks.items() if k not in left[u.id]}) if u.id in left else u
        for u in manifest
    ]
    kept = Manifest(tuple(rows))
    heard = tuple(heard_of(kept, task_names(kept)))
    silent = {leak.leaves.id for leak in heard}
    return Manifest(tuple(replace(u, split="test") if u.id in silent else u for u in rows)), (*found, *heard)


def told(manifest: Manifest, leaks: Iterable[Leak]) -> list[str]:
    """One line for each task and trait: how many utterances leave, of which corpora, and an example."""
    groups: dict[tuple[str, str], list[Leak]] = {}
    for leak in leaks:
        groups.setdefault((leak.task, leak.trait), []).append(leak)
    lines = []
    for (task, trait), rows in groups.items():
        corpora = ", ".join(sorted({leak.leaves.corpus for leak in rows}))
        first = rows[0]
        did = "does not hear" if task == PRETRAINING else "leaves out"
        lines.append(
            f"{task} {did} {len(rows):,} of {corpora}, same {trait} as what is held back; "
            f"the first is {first.leaves.id}, for {first.kept.id}"
        )
    heard = sum(u.split == "train" and u.tasks.get("sid") in ("dev", "test") for u in manifest)
    if heard:
        lines.append(f"sid: {heard:,} of its dev and test utterances are heard in pretraining, without their speaker")
    return lines


def check(manifest: Manifest, task: Task) -> None:
    """Refuse a task of which a split has heard what another asks, or pretraining what it holds back.

    Raises:
        DataError: with two utterances and the way out.
    """
    names = [fold.name for fold in folds_of(manifest, task)]
    for name in names:
        for leak in leaks_of(manifest, name):
            _refuse(leak)
    for leak in heard_of(manifest, names):
        _refuse(leak)


def check_together(manifest: Manifest, names: Sequence[str]) -> None:
    """Refuse tasks that are to train one model where one learns from what another asks.

    Args:
        manifest: all utterances; each task alone is checked.
        names: of the tasks, none in folds.

    Raises:
        DataError: with two utterances and the way out.
    """
    for asks in names:
        held = _held_back(manifest, [asks])
        for learns in (name for name in names if name != asks):
            for utterance in (u for u in manifest if u.tasks.get(learns) == "train"):
                if (found := _found(utterance, held)) is not None:
                    kept, trait = found
                    raise DataError(
                        f"{utterance.id} is in train of '{learns}' and has the same {trait.name} as {kept.id}, which is in "
                        f"{kept.tasks[asks]} of '{asks}': a model that learns both tasks would know it; give both the same "
                        "splits by speaker in the corpus' settings, or learn one task alone"
                    )


def _refuse(leak: Leak) -> None:
    where = "the training split of pretraining" if leak.task == PRETRAINING else f"{leak.sides[1]} of '{leak.task}'"
    raise DataError(
        f"{leak.leaves.id} is in {where} and has the same {leak.trait} as {leak.kept.id}, which is "
        f"{'held back by a probe' if leak.task == PRETRAINING else 'in ' + leak.sides[0]}; `decant prepare` "
        "leaves such utterances out: run it again, or correct the splits of the manifest"
    )
