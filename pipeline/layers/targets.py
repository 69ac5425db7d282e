"""Targets: receipts of stores in, exactly the arrays that one student reads out.

The result is the firewall between extraction and training: it names the store, the arrays and their digests and nothing
else, so when another teacher, or a layer this student does not predict, is extracted anew its bytes stay and no
student reruns.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from cache.errors import SettingsError, StoreError
from cache.publish import read_json
from cache.ragged import Store, layer_name, layer_of
from cache.receipts import open_arrays

FORMAT = 1


class SingleTeacher(BaseModel, frozen=True, extra="forbid"):
    """One prediction head per layer of one teacher."""

    kind: Literal["single"]
    """single: one teacher."""
    teacher: str
    """Its name: there is a receipt NAME.json for it."""
    layers: tuple[int, ...] = Field(min_length=1)
    """Layers to predict, one head each, in this order; 0 is the transformer's input."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What a student predicts: arrays of one store, one head per array."""

    key: str
    """Of the feature store."""
    width: int
    arrays: dict[str, str]
    """Array -> digest of its shards, in the order of the heads."""
    audio: str
    """Digest of the ids and samples that the store was made from (`Manifest.audio_digest`)."""

    @property
    def num_heads(self) -> int:
        """N: layers to predict."""
        return len(self.arrays)


def choose_targets(ensemble: SingleTeacher, receipts: Path) -> Targets:
    """Find the arrays that an ensemble asks for in a folder of receipts.

    Raises:
        SettingsError: no receipt of that teacher, or a layer that was not kept; the message names those there are.
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
    for layer in ensemble.layers:
        if layer_name(layer) not in arrays:
            kept = ", ".join(str(layer_of(name)) for name in sorted(arrays) if name.startswith("layer-"))
            raise SettingsError(
                f"ensemble.layers asks for layer {layer} of {ensemble.teacher}, whose store has layers {kept}; "
                f"choose among them, or add it to what is kept of {ensemble.teacher}"
            )
    chosen = {layer_name(layer): arrays[layer_name(layer)] for layer in ensemble.layers}
    return Targets(
        key=receipt["key"],
        width=next(iter(chosen.values()))["width"],
        arrays={name: array["digest"] for name, array in chosen.items()},
        audio=receipt["fingerprint"]["audio"],
    )


def targets_json(targets: Targets) -> dict[str, Any]:
    """What is written: a list, because the order of the heads counts and JSON objects are sorted."""
    return {
        "format": FORMAT,
        "kind": "targets",
        "key": targets.key,
        "width": targets.width,
        "arrays": [{"name": name, "digest": digest} for name, digest in targets.arrays.items()],
        "audio": targets.audio,
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
    )


def open_targets(targets: Targets) -> Store:
    """Open the store for training, after checking that it is complete and the one that was meant.

    Raises:
        StoreError: it is not; the message names the stage to run.
    """
    return open_arrays("features", targets.key, targets.arrays)
