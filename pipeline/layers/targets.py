"""Targets: what one student reads, as `decant targets` chose it, and where its first weights come from; written and read.

They are the firewall between extraction and training: they name stores, arrays and starting weights by their digests, say
which arrays each target is the mean of, hold the channel statistics where targets are normalised, and nothing else. So when
another teacher, or a layer this student does not predict, is extracted anew their bytes stay and no student reruns.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float32
from pydantic import AfterValidator, BaseModel, Field

from cache.errors import SettingsError, StoreError
from cache.names import PROJECTION, array_name, layers_of
from cache.publish import digest_bytes, digest_file, read_json
from cache.ragged import Store
from cache.receipts import open_arrays
from pipeline.layers.ensembles import AnyEnsemble, Average, Concat, Groups, members
from pipeline.layers.statistics import Statistics

FORMAT = 3

TargetLayers = tuple[int | Literal["projection"], ...]
"""The layers that a target is made of; usually one."""


class Adopted(BaseModel, frozen=True, extra="forbid"):
    """Start from a teacher's convolutions, projection, positions and first blocks."""

    kind: Literal["adopted"]
    """adopted: weights of a teacher under the student's names."""
    teacher: str
    """Whose; `decant teacher` wrote them as TEACHER.safetensors."""
    final_norm: bool
    """true: its last norm, too, so that all of a teacher is copied (DPHuBERT); false: that starts at 1 and 0 (DistilHuBERT)."""


def _several(teachers: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(teachers)) < max(2, len(teachers)):
        raise ValueError(f"{list(teachers)} has no mean: name two teachers or more, each once")
    return teachers


class Mean(BaseModel, frozen=True, extra="forbid"):
    """Start from the mean of the weights of several teachers of one shape."""

    kind: Literal["mean"]
    """mean: of each weight of theirs."""
    teachers: Annotated[tuple[str, ...], AfterValidator(_several)]
    """Whose; `decant teacher` wrote each as TEACHER.safetensors."""
    final_norm: bool
    """Whether the mean of their last norms is taken, too; else that starts at 1 and 0."""


class Random(BaseModel, frozen=True, extra="forbid"):
    """Start from the seed."""

    kind: Literal["random"]
    """random: every weight is drawn."""


AnyInit = Adopted | Mean | Random
Init = Annotated[AnyInit, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class StoreTargets:
    """What a student reads of one store: arrays of one teacher."""

    key: str
    """Of the feature store."""
    width: int
    arrays: dict[str, str]
    """Array -> digest of its shards, in the order in which they are read."""
    targets: tuple[tuple[str, ...], ...]
    """The arrays that each target is the mean of, in the order of the heads; usually one."""
    statistics: Statistics | None
    """Of the channels of each target, in their order; None where targets are taken as they are."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What a student reads: arrays of some stores, and the weights it starts from."""

    stores: tuple[StoreTargets, ...]
    """In the order of the teachers; a store may come twice."""
    audio: str
    """Digest of the ids and samples that all stores were made from (`Manifest.audio_digest`)."""
    init: tuple[str, ...]
    """SHA-256 of each file of weights it starts from; none where all are drawn."""

    @property
    def widths(self) -> list[int]:
        """Of the layers of each store."""
        return [store.width for store in self.stores]


def target_layers(ensemble: AnyEnsemble, targets: Targets) -> list[TargetLayers]:
    """The layers of teachers that each target is made of, ascending, in the order of the heads: for students whose own layers
    are compared with them. Where teachers are averaged or put side by side, they are those of all teachers."""
    of_stores = [[_layers_in(target) for target in store.targets] for store in targets.stores]
    if isinstance(ensemble, Average | Concat):
        return [_ascending([layer for one in layers for layer in one]) for layers in zip(*of_stores, strict=True)]
    return [_ascending(layers) for of_one in of_stores for layers in of_one]


def _layers_in(target: tuple[str, ...]) -> TargetLayers:
    return tuple(layer for array in target for layer in layers_of(array) or (PROJECTION,))


def _ascending(layers: Sequence[int | Literal["projection"]]) -> TargetLayers:
    return tuple(sorted(set(layers), key=lambda layer: -1 if layer == PROJECTION else int(layer)))


def weights_of(init: AnyInit, weights: Path) -> list[Path]:
    """The files of the weights to start from, in the folder that `decant teacher` writes them to.

    Raises:
        SettingsError: one is not there; the message names those there are.
    """
    if isinstance(init, Random):
        return []
    named = {"teacher": (init.teacher,)} if isinstance(init, Adopted) else {"teachers": init.teachers}
    ((field, teachers),) = named.items()
    paths = [weights / f"{teacher}.safetensors" for teacher in teachers]
    for teacher, path in zip(teachers, paths, strict=True):
        if not path.exists():
            there = sorted(p.stem for p in weights.glob("*.safetensors"))
            raise SettingsError(
                f"init.{field} is {teacher!r} but {weights} has weights of {', '.join(there) or 'no teacher'}; "
                f"choose one of them, or run `decant teacher {teacher}`"
            )
    return paths


def open_init(targets: Targets, init: AnyInit, weights: Path) -> list[Path]:
    """The files to start from, after checking that they are those that were meant; none where all weights are drawn.

    Raises:
        SettingsError: one is not there.
        StoreError: the targets were chosen with other weights.
    """
    paths = weights_of(init, weights)
    if len(paths) != len(targets.init):
        raise StoreError(
            f"the targets were chosen with {len(targets.init)} files of weights and init asks for {len(paths)}; "
            "run `decant targets` again"
        )
    for path, digest in zip(paths, targets.init, strict=True):
        if digest_file(path) != digest:
            raise StoreError(f"{path} is not the file that the targets were chosen with; run `decant targets` again")
    return paths


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
                "targets": [list(target) for target in store.targets],
                "statistics": None if store.statistics is None else _statistics_json(store.statistics, numbers),
            }
            for store in targets.stores
        ],
        "audio": targets.audio,
        "init": list(targets.init),
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
        made_of = tuple(tuple(target) for target in store["targets"])
        shape = len(made_of), store["width"]
        statistics = store["statistics"] and Statistics(
            *(_read_table(path, store["statistics"][n], shape) for n in ("mean", "std"))
        )
        stores.append(StoreTargets(store["key"], store["width"], arrays, made_of, statistics))
    return Targets(tuple(stores), described["audio"], tuple(described["init"]))


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
    normalised = {store.statistics is not None for store in targets.stores}
    if isinstance(ensemble, Groups):
        fits = [len(store.targets) for store in targets.stores] == [ensemble.groups.num_groups]
        asked = f"{ensemble.groups.num_groups} groups of layers"
    else:
        names = [[(array_name(layer),) for layer in member.layers] for member in members(ensemble)]
        fits = names == [list(store.targets) for store in targets.stores]
        asked = f"{ensemble.kind} of these layers"
    if not fits or normalised != {ensemble.normalise is not None}:
        raise StoreError(f"the targets were chosen for another ensemble than {asked}; run `decant targets` again")
