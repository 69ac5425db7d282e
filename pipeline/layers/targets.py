"""Targets: receipts and starting weights of all teachers in, exactly what one student reads of them out.

The result is the firewall between extraction and training: it names the store, the arrays and the starting weights by
their digests and nothing else, so when another teacher, or a layer this student does not predict, is extracted anew
its bytes stay and no student reruns.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from cache.errors import SettingsError, StoreError
from cache.names import array_name, layers_of
from cache.publish import digest_file, read_json
from cache.ragged import Store
from cache.receipts import open_arrays
from pipeline.extraction.settings import LayerMean

FORMAT = 1


class SingleTeacher(BaseModel, frozen=True, extra="forbid"):
    """One prediction head per layer of one teacher."""

    kind: Literal["single"]
    """single: one teacher."""
    teacher: str
    """Its name: there is a receipt NAME.json for it."""
    layers: tuple[int | LayerMean, ...] = Field(min_length=1)
    """What to predict, one head each, in this order: layers (0 is the transformer's input), or lists of those whose mean is stored."""


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
class Targets:
    """What a student reads: arrays of one store, one head per array, and the weights it starts from."""

    key: str
    """Of the feature store."""
    width: int
    arrays: dict[str, str]
    """Array -> digest of its shards, in the order of the heads."""
    audio: str
    """Digest of the ids and samples that the store was made from (`Manifest.audio_digest`)."""
    init: str | None
    """SHA-256 of the file of the weights it starts from; None where all are drawn."""

    @property
    def num_heads(self) -> int:
        """N: layers to predict."""
        return len(self.arrays)


def choose_targets(ensemble: SingleTeacher, receipts: Path, init: Adopted | Random, weights: Path) -> Targets:
    """Find the arrays that an ensemble asks for in a folder of receipts, and the start in a folder of weights.

    Raises:
        SettingsError: no receipt or no weights of that teacher, or a layer that was not kept; the message names those
            there are.
        StoreError: the file is no receipt of features.
    """
    path = receipts / f"{ensemble.teacher}.json"
    if not path.exists():
        there = sorted(p.stem for p in receipts.glob("*.json") if p.stem != "waves")
        raise SettingsError(
            f"ensemble.teacher is {ensemble.teacher!r} but {receipts} has receipts of {', '.join(there) or 'no teacher'}; "
            f"choose one of them, or run `decant extract {ensemble.teacher}`"
        )
    receipt = read_json(path)
    if receipt.get("kind") != "features":
        raise StoreError(f"{path} is a receipt of {receipt.get('kind')}, not of features; run `decant extract` again")
    if len(set(ensemble.layers)) < len(ensemble.layers):
        raise SettingsError(
            f"ensemble.layers is {list(ensemble.layers)}, which names a layer twice; one head per layer"
        )
    arrays = receipt["arrays"]
    for wanted in ensemble.layers:
        if array_name(wanted) not in arrays:
            kept = ", ".join(_in_words(layers_of(name)) for name in sorted(arrays))
            raise SettingsError(
                f"ensemble.layers asks for layer {_in_words(wanted)} of {ensemble.teacher}, whose store has layers {kept}; "
                f"choose among them, or add it to what is kept of {ensemble.teacher}"
            )
    chosen = {array_name(wanted): arrays[array_name(wanted)] for wanted in ensemble.layers}
    return Targets(
        key=receipt["key"],
        width=next(iter(chosen.values()))["width"],
        arrays={name: array["digest"] for name, array in chosen.items()},
        audio=receipt["fingerprint"]["audio"],
        init=None if isinstance(init, Random) else digest_file(weights_of(init, weights)),
    )


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


def targets_json(targets: Targets) -> dict[str, Any]:
    """What is written: a list, because the order of the heads counts and JSON objects are sorted."""
    return {
        "format": FORMAT,
        "kind": "targets",
        "key": targets.key,
        "width": targets.width,
        "arrays": [{"name": name, "digest": digest} for name, digest in targets.arrays.items()],
        "audio": targets.audio,
        "init": targets.init,
    }


def read_targets(path: Path) -> Targets:
    """Read what `targets_json` gave.

    Raises:
        StoreError: missing, of another kind or of a newer format.
    """
    described = read_json(path)
    if (described.get("kind"), described.get("format")) != ("targets", FORMAT):
        kind, version = described.get("kind"), described.get("format")
        raise StoreError(f"{path} is {kind} format {version}, not targets format {FORMAT}; run `decant targets` again")
    return Targets(
        key=described["key"],
        width=described["width"],
        arrays={array["name"]: array["digest"] for array in described["arrays"]},
        audio=described["audio"],
        init=described["init"],
    )


def open_targets(targets: Targets, verify: bool | float = False) -> Store:
    """Open the store for training, after checking that it is complete and the one that was meant.

    Raises:
        StoreError: it is not; the message names the stage to run.
    """
    return open_arrays("features", targets.key, targets.arrays, verify)
