"""Targets: receipts and starting weights of all teachers in, exactly what one student reads of them out.

The result is the firewall between extraction and training: it names stores, arrays and starting weights by their digests,
holds the channel statistics where targets are normalised, and nothing else. So when another teacher, or a layer this
student does not predict, is extracted anew its bytes stay and no student reruns.
"""

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float32
from pydantic import BaseModel, Field

from cache.errors import SettingsError, StoreError
from cache.names import array_name, layers_of
from cache.publish import digest_bytes, digest_file, read_json
from cache.ragged import Store
from cache.receipts import open_arrays
from pipeline.layers.ensembles import AnyEnsemble, Member, head_groups, members
from pipeline.layers.statistics import Statistics, channel_statistics

FORMAT = 2


class Adopted(BaseModel, frozen=True, extra="forbid"):
    """Start from a teacher's convolutions, projection, positions and first blocks."""

    kind: Literal["adopted"]
    """adopted: weights of a teacher under the student's names."""
    teacher: str
    """Whose; `decant teacher` wrote them as TEACHER.safetensors."""


class Random(BaseModel, frozen=True, extra="forbid"):
    """Start from the seed."""

    kind: Literal["random"]
    """random: every weight is drawn."""


Init = Annotated[Adopted | Random, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class StoreTargets:
    """What a student reads of one store: arrays of one teacher."""

    key: str
    """Of the feature store."""
    width: int
    arrays: dict[str, str]
    """Array -> digest of its shards, in the order of the heads."""
    statistics: Statistics | None
    """Of its channels, in the order of the arrays; None where targets are taken as they are."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What a student reads: arrays of some stores, and the weights it starts from."""

    stores: tuple[StoreTargets, ...]
    """In the order of the teachers; a store may come twice."""
    audio: str
    """Digest of the ids and samples that all stores were made from (`Manifest.audio_digest`)."""
    init: str | None
    """SHA-256 of the file of the weights it starts from; None where all are drawn."""

    @property
    def widths(self) -> list[int]:
        """Of the layers of each store."""
        return [store.width for store in self.stores]


def choose_targets(ensemble: AnyEnsemble, receipts: Path, init: Adopted | Random, weights: Path) -> Targets:
    """Find the arrays that an ensemble asks for in a folder of receipts, and the start in a folder of weights.

    Raises:
        SettingsError: no receipt or no weights of a teacher, or a layer that was not kept; the message names those
            there are. Or teachers that cannot be combined so.
        StoreError: a file is no receipt of features, or teachers were extracted from different audio; where statistics
            are needed also a store that is not there.
        DataError: statistics of frames that are not finite.
    """
    teachers = members(ensemble)
    found = [_read_receipt(member.teacher, receipts) for member in teachers]
    chosen = [_choose(member, receipt) for member, receipt in zip(teachers, found, strict=True)]
    audio = [receipt["fingerprint"]["audio"] for receipt in found]
    for member, digest in zip(teachers, audio, strict=True):
        if digest != audio[0]:
            raise StoreError(
                f"{member.teacher} was extracted from other utterances than {teachers[0].teacher}, and a student hears each "
                "with all its teachers; extract both again with one manifest, one extract.long and keep.select: all"
            )
    head_groups(ensemble, [_width(arrays) for arrays in chosen])  # refuses what cannot be combined
    stores = []
    for receipt, arrays in zip(found, chosen, strict=True):
        digests = {name: array["digest"] for name, array in arrays.items()}
        statistics = None
        if ensemble.normalise is not None:
            with_rows = open_arrays("features", receipt["key"], digests, verify=True)
            statistics = channel_statistics(with_rows, list(digests), ensemble.normalise)
        stores.append(StoreTargets(receipt["key"], _width(arrays), digests, statistics))
    start = None if isinstance(init, Random) else digest_file(weights_of(init, weights))
    return Targets(tuple(stores), audio[0], start)


def _width(arrays: dict[str, Any]) -> int:
    """Of the arrays that a receipt describes: one store has one."""
    width: int = next(iter(arrays.values()))["width"]
    return width


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


def _choose(member: Member, receipt: dict[str, Any]) -> dict[str, Any]:
    """What a receipt says of the arrays that are asked for, in their order."""
    teacher, layers, _ = member
    if len(set(layers)) < len(layers):
        raise SettingsError(f"ensemble.layers is {list(layers)}, which names a layer twice; one head per layer")
    arrays = receipt["arrays"]
    for wanted in layers:
        if array_name(wanted) not in arrays:
            kept = ", ".join(_in_words(layers_of(name)) for name in sorted(arrays))
            raise SettingsError(
                f"ensemble.layers asks for layer {_in_words(wanted)} of {teacher}, whose store has layers {kept}; "
                f"choose among them, or add it to what is kept of {teacher}"
            )
    return {array_name(wanted): arrays[array_name(wanted)] for wanted in layers}


def _in_words(layers: int | tuple[int, ...]) -> str:
    """As it is written in the settings: one layer, or a list whose mean is meant."""
    if isinstance(layers, int):
        return str(layers)
    return str(layers[0]) if len(layers) == 1 else str(list(layers))


def weights_of(init: Adopted, weights: Path) -> Path:
    """The file of the weights to adopt, in the folder that `decant teacher` writes them to.

    Raises:
        SettingsError: not there; the message names those there are.
    """
    path = weights / f"{init.teacher}.safetensors"
    if not path.exists():
        there = sorted(p.stem for p in weights.glob("*.safetensors"))
        raise SettingsError(
            f"init.teacher is {init.teacher!r} but {weights} has weights of {', '.join(there) or 'no teacher'}; "
            f"choose one of them, or run `decant teacher {init.teacher}`"
        )
    return path


def open_init(targets: Targets, init: Adopted | Random, weights: Path) -> Path | None:
    """The file to start from, after checking that it is the one that was meant; None where all weights are drawn.

    Raises:
        SettingsError: not there.
        StoreError: the targets were chosen with other weights.
    """
    if isinstance(init, Random):
        return None
    path = weights_of(init, weights)
    if digest_file(path) != targets.init:
        raise StoreError(f"{path} is not the file that the targets were chosen with; run `decant targets` again")
    return path


def targets_json(targets: Targets, numbers: bool = True) -> dict[str, Any]:
    """What is written: lists, because the order of stores and heads counts and JSON objects are sorted.

    Args:
        targets: what is read.
        numbers: whether statistics are written out, as base64 of little-endian float32; else their SHA-256, for products
            that only have to tell what they were made from.
    """
    return {
        "format": FORMAT,
        "kind": "targets",
        "stores": [
            {
                "key": store.key,
                "width": store.width,
                "arrays": [{"name": name, "digest": digest} for name, digest in store.arrays.items()],
                "statistics": None if store.statistics is None else _statistics_json(store.statistics, numbers),
            }
            for store in targets.stores
        ],
        "audio": targets.audio,
        "init": targets.init,
    }


def _statistics_json(statistics: Statistics, numbers: bool) -> dict[str, str]:
    tables = {"mean": statistics.mean.astype("<f4").tobytes(), "std": statistics.std.astype("<f4").tobytes()}
    return {n: base64.b64encode(data).decode() if numbers else digest_bytes(data) for n, data in tables.items()}


def read_targets(path: Path) -> Targets:
    """Read what `targets_json` gave.

    Raises:
        StoreError: missing, damaged, or of another kind or format.
    """
    described = read_json(path)
    if (described.get("kind"), described.get("format")) != ("targets", FORMAT):
        kind, version = described.get("kind"), described.get("format")
        raise StoreError(f"{path} is {kind} format {version}, not targets format {FORMAT}; run `decant targets` again")
    stores = []
    for store in described["stores"]:
        arrays = {array["name"]: array["digest"] for array in store["arrays"]}
        shape = len(arrays), store["width"]
        statistics = store["statistics"] and Statistics(
            *(_read_table(path, store["statistics"][n], shape) for n in ("mean", "std"))
        )
        stores.append(StoreTargets(store["key"], store["width"], arrays, statistics))
    return Targets(tuple(stores), described["audio"], described["init"])


def _read_table(path: Path, text: str, shape: tuple[int, int]) -> Float32[np.ndarray, "N D"]:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32).reshape(shape)
    except (binascii.Error, ValueError) as error:
        raise StoreError(f"{path}: statistics are not {shape} numbers ({error}); run `decant targets` again") from error


def open_targets(targets: Targets, verify: bool | float = False) -> list[Store]:
    """Open the stores for training, after checking that they are complete and those that were meant.

    Raises:
        StoreError: they are not; the message names the stage to run.
    """
    return [open_arrays("features", store.key, store.arrays, verify) for store in targets.stores]


def check_targets(ensemble: AnyEnsemble, targets: Targets) -> None:
    """See that targets were chosen for this ensemble, as far as they tell.

    Raises:
        StoreError: they were not.
    """
    asked = [[array_name(layer) for layer in member.layers] for member in members(ensemble)]
    there = [list(store.arrays) for store in targets.stores]
    normalised = {store.statistics is not None for store in targets.stores}
    if asked != there or normalised != {ensemble.normalise is not None}:
        raise StoreError(
            f"the targets were chosen for another ensemble than {ensemble.kind} of these layers; run `decant targets` again"
        )
