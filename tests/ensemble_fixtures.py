"""A small world with several teachers, and settings of ensembles of them."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline.layers.choose import choose_targets
from pipeline.layers.ensembles import AnyEnsemble, Ensemble
from pipeline.layers.targets import Random, Targets
from tests.distill_fixtures import EXTRACT, World, make_world
from tests.distill_fixtures import write_receipt as run_teacher

INT8 = EXTRACT.model_copy(update={"codec": "int8"})
NARROW = {"width": 12, "head_width": 6, "position_groups": 3}
SAMPLE = {"kind": "channel", "seconds": 3.0, "seed": 1}
BOTH = (("hubert", (3, 1), 1.0), ("wavlm", (1, 0), 3.0))
MIXED = (("hubert", (3, 1), 1.0), ("narrow", (0, 3, 1), 3.0))
PAIRED = (("hubert", (3, 1), 1.0), ("narrow", (0, 3), 1.0))


def make_teachers(root: Path) -> World:
    """hubert in float16; wavlm in float16; narrow, of another width and in int8; twin, which is hubert once more."""
    world = make_world(root)
    run_teacher(world, "wavlm", seed=9)
    run_teacher(world, "narrow", seed=4, params=INT8, **NARROW)
    run_teacher(world, "twin", seed=0)
    return world


def several(kind: str, *teachers: tuple[str, tuple[Any, ...], float], normalise: Any = None) -> dict[str, Any]:
    """Settings of an ensemble from (teacher, layers, weight)."""
    listed = [
        {"teacher": t, "layers": list(ls), **({} if kind == "concat" else {"weight": w})} for t, ls, w in teachers
    ]
    return {"kind": kind, "teachers": listed, "normalise": normalise}


def single(teacher: str = "hubert", layers: tuple[Any, ...] = (3, 1), normalise: Any = None) -> dict[str, Any]:
    """Settings of one teacher."""
    return {"kind": "single", "teacher": teacher, "layers": list(layers), "normalise": normalise}


def parsed(ensemble: dict[str, Any]) -> AnyEnsemble:
    """As a stage reads them."""
    return TypeAdapter(Ensemble).validate_python(ensemble)


def choose(world: World, ensemble: dict[str, Any]) -> Targets:
    """The targets of a student that starts from a seed."""
    return choose_targets(parsed(ensemble), world.root / "receipts", Random(kind="random"), world.root / "init")
