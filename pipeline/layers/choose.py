"""Receipts, similarities and starting weights of all teachers in, exactly what one student reads of them out."""

from pathlib import Path
from typing import Any

from cache.errors import SettingsError, StoreError
from cache.names import array_name, in_order, in_words
from cache.publish import digest_file, read_json
from cache.receipts import open_arrays
from pipeline.layers.ensembles import AnyEnsemble, Groups, Member, head_groups, members
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
        from pipeline.layers.grouped import arrays_of_groups  # brings scipy and dask: seconds that others need not wait

        made_of = [arrays_of_groups(ensemble, found[0], similarity)]
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
                f"ensemble.layers asks for layer {in_words(wanted)} of {teacher}, whose store has layers {kept_in_words(receipt)}; "
                f"choose among them, or add it to what is kept of {teacher}"
            )
    return tuple((array_name(wanted),) for wanted in layers)


def kept_in_words(receipt: dict[str, Any]) -> str:
    """What a store keeps, as it is written in settings."""
    return ", ".join(map(in_words, in_order(list(receipt["arrays"]))))
