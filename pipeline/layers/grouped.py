"""What was found of how alike a teacher's layers are, and its receipt, in; the arrays of each group of layers out (SKILL)."""

from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import SettingsError, StoreError
from cache.names import array_name, in_words
from cache.publish import read_json
from pipeline.layers.choose import MadeOf, kept_in_words
from pipeline.layers.ensembles import Groups
from pipeline.layers.groups import group_layers
from pipeline.layers.similarity import Similarity


def arrays_of_groups(ensemble: Groups, receipt: dict[str, Any], similarity: Path | None) -> MadeOf:
    """For each group its stored mean where there is one, else each of its layers.

    Raises:
        SettingsError: no similarity of the teacher, or a layer that its store does not keep; the message says what there is.
        StoreError: the similarity is damaged, or that of another store.
    """
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
                f"a group of {teacher} has layers {list(group)}, and its store has layers {kept_in_words(receipt)}; add "
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
