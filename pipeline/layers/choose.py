"""Receipts, similarities and starting weights of all teachers in, exactly what one student reads of them out."""

from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import SettingsError, StoreError
from cache.names import array_name, in_order, in_words
from cache.publish import digest_file, read_json
from cache.receipts import open_arrays
from pipeline.layers.ensembles import AnyEnsemble, Groups, Member, head_groups, members
from pipeline.layers.groups import group_layers
from pipeline.layers.similarity import Similarity
from pipeline.layers.statistics import channel_statistics
from pipeline.layers.targets import AnyInit, StoreTargets, Targets, weights_of

MadeOf = tuple[tuple[str, ...], ...]
"""The arrays that each target is the mean of."""


def choose_targets(
    ensemble: AnyEnsemble, receipts: Path, init: AnyInit, weights: Path, similarity: Path | None = None
) -> Targets:
    """Find the arrays that an ensemble asks for in a folder of receipts, and the start in a folder of weights.

    Args:
        ensemble: whom the student learns from.
        receipts: one NAME.json per teacher.
        init: how the student starts.
        weights: one NAME.safetensors per teacher.
        similarity: one NAME.json per teacher, which groups of layers are made of; other ensembles need none.

    Raises:
        SettingsError: no receipt, similarity or weights of a teacher, or a layer that was not kept; the message names those
            there are. Or teachers that cannot be combined, or layers that cannot be grouped, so.
        StoreError: a file is no receipt of features, teachers were extracted from different audio, or a similarity is that
            of another store; where statistics are needed also a store that is not there.
        DataError: statistics of frames that are not finite.
    """
    teachers = members(ensemble)
    found = [_read_receipt(member.teacher, receipts) for member in teachers]
    if isinstance(ensemble, Groups):
        made_of = [_grouped(ensemble, found[0], similarity)]
    else:
        made_of = [_choose(member, receipt) for member, receipt in zip(teachers, found, strict=True)]
    audio = [receipt["fingerprint"]["audio"] for receipt in found]
    for member, digest in zip(teachers, audio, strict=True):
        if digest != audio[0]:
            raise StoreError(
                f"{member.teacher} was extracted from other utterances than {teachers[0].teacher}, and a student hears each "
                "with all its teachers; extract both again with one manifest, one extract.long and keep.select: all"
            )
    widths = [receipt["arrays"][of_one[0][0]]["width"] for receipt, of_one in zip(found, made_of, strict=True)]
    head_groups(ensemble, widths)  # refuses what cannot be combined
    stores = []
    for receipt, of_one, width in zip(found, made_of, widths, strict=True):
        digests = {array: receipt["arrays"][array]["digest"] for target in of_one for array in target}
        statistics = None
        if ensemble.normalise is not None:
            with_rows = open_arrays("features", receipt["key"], digests, verify=True)
            statistics = channel_statistics(with_rows, of_one, ensemble.normalise)
        stores.append(StoreTargets(receipt["key"], width, digests, of_one, statistics))
    return Targets(tuple(stores), audio[0], tuple(digest_file(path) for path in weights_of(init, weights)))


def _read_receipt(teacher: str, receipts: Path) -> dict[str, Any]:
    path = receipts / f"{teacher}.json"
    if not path.exists():
        there = sorted(p.stem for p in receipts.glob("*.json") if p.stem != "waves")
        raise SettingsError(
            f"the ensemble asks for {teacher!r} but {receipts} has receipts of {', '.join(there) or 'no teacher'}; "
            f"choose one of them, or run `decant extract {teacher}`"
        )
    receipt: dict[str, Any] = read_json(path)
    if receipt.get("kind") != "features":
        raise StoreError(f"{path} is a receipt of {receipt.get('kind')}, not of features; run `decant extract` again")
    return receipt


def _choose(member: Member, receipt: dict[str, Any]) -> MadeOf:
    """The arrays that were asked for, one a target, in their order."""
    teacher, layers, _ = member
    if len(set(layers)) < len(layers):
        raise SettingsError(f"ensemble.layers is {list(layers)}, which names a layer twice; one head per layer")
    for wanted in map(array_name, layers):
        if wanted not in receipt["arrays"]:
            raise SettingsError(
                f"ensemble.layers asks for layer {in_words(wanted)} of {teacher}, whose store has layers {_kept(receipt)}; "
                f"choose among them, or add it to what is kept of {teacher}"
            )
    return tuple((array_name(wanted),) for wanted in layers)


def _grouped(ensemble: Groups, receipt: dict[str, Any], similarity: Path | None) -> MadeOf:
    """The arrays of each group of layers: its stored mean where there is one, else each of its layers."""
    teacher = ensemble.teacher
    if similarity is None:
        raise SettingsError(
            "ensemble: {kind: groups} is made of how alike layers are; pass --similarity reports/similarity, where "
            f"`decant similarity {teacher}` writes that"
        )
    found, measure = _read_similarity(teacher, similarity, receipt)
    made_of = []
    for group in group_layers(found, measure, ensemble.groups).groups:
        layers = tuple(map(array_name, group))
        mean = array_name(group) if len(group) > 1 else layers[0]
        if mean not in receipt["arrays"] and (missing := [name for name in layers if name not in receipt["arrays"]]):
            raise SettingsError(
                f"a group of {teacher} has layers {list(group)}, and its store has layers {_kept(receipt)}; add "
                f"{in_words(missing[0])} to what is kept of {teacher}, or leave it out of the groups (leave_out)"
            )
        made_of.append((mean,) if mean in receipt["arrays"] else layers)
    return tuple(made_of)


def _read_similarity(teacher: str, folder: Path, receipt: dict[str, Any]) -> tuple[Similarity, str]:
    """What was found, and by which measure, after checking that it was found in this store."""
    path = folder / f"{teacher}.json"
    if not path.exists():
        there = sorted(p.stem for p in folder.glob("*.json"))
        raise SettingsError(
            f"the ensemble groups layers of {teacher!r} but {folder} has similarities of {', '.join(there) or 'no teacher'}; "
            f"choose one of them, or run `decant similarity {teacher}`"
        )
    described = read_json(path)
    again = f"run `decant similarity {teacher}` again"
    if (described.get("kind"), described.get("format")) != ("similarity", 1):
        raise StoreError(
            f"{path} is {described.get('kind')} format {described.get('format')}, not similarity 1; {again}"
        )
    try:
        key, then, measure = described["key"], described["arrays"], described["settings"]["measure"]
        found = Similarity(tuple(described["layers"]), np.array(described["matrix"], np.float64), described["frames"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}); {again}") from error
    now = {name: array["digest"] for name, array in receipt["arrays"].items()}
    if key != receipt["key"] or any(now.get(name, digest) != digest for name, digest in then.items()):
        raise StoreError(f"{path} was found in another store than the receipt of {teacher} names; {again}")
    return found, measure


def _kept(receipt: dict[str, Any]) -> str:
    """What a store keeps, as it is written in settings."""
    return ", ".join(map(in_words, in_order(list(receipt["arrays"]))))
