"""Learners: settings, targets and starting weights in, the learner of a phase out; a pure function of them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from cache.errors import SettingsError
from pipeline.distill.ensemble import TargetMaker
from pipeline.distill.learner import Learner, Pruning
from pipeline.distill.predictor import make_predictor
from pipeline.distill.pruning import SparsityControl, check_prunable
from pipeline.distill.settings import Phase, StudentParams, phases_of
from pipeline.distill.state import Saved
from pipeline.distill.world import ALONE, World
from pipeline.layers.ensembles import AnyEnsemble, Average, Concat, HeadGroup, head_groups, members
from pipeline.layers.targets import Random, Targets, target_layers
from pipeline.student.adopt import copy_adopted
from pipeline.student.compact import compact
from pipeline.student.encoder import Encoder, initialise
from pipeline.student.gates import Gates


def first_learner(
    params: StudentParams,
    targets: Targets,
    init: Sequence[Path],
    device: str,
    make_targets: TargetMaker,
    world: World = ALONE,
) -> Learner:
    """The learner before its first step.

    Args:
        params: the student's settings.
        targets: the arrays it predicts.
        init: weights to adopt.
        device: cpu, cuda, cuda:1.
        make_targets: stored rows to what predictions are compared with.
        world: the processes that share every step.

    Raises:
        SettingsError: the init is to be adopted and is not given or does not fit, teachers cannot be combined so, or the
            student lacks a layer that predicts.
    """
    encoder = Encoder(params.shape, params.train.feature_grad_mult)
    generator = torch.Generator().manual_seed(params.seed)
    initialise(encoder, generator)
    groups = head_groups(params.ensemble, targets.widths)
    layers = target_layers(params.ensemble, targets)
    predictor = make_predictor(params.predict, params.shape, groups, layers, generator)
    if not isinstance(params.init, Random):
        if not init:
            raise SettingsError(f"init is {{kind: {params.init.kind}}}, which needs weights: pass --init data/init")
        copy_adopted(encoder, init, params.init.final_norm)
    pruning = None
    if params.prune is not None:
        check_prunable(params.shape, params.prune)
        gates = Gates(params.shape, params.prune.units, params.prune.drop, generator)
        pruning = Pruning(gates, SparsityControl(params.prune))
    weights, phase = _target_weights(params, groups), phases_of(params)[0]
    return Learner(params, phase, encoder, predictor, weights, device, make_targets, pruning, world)


def target_names(ensemble: AnyEnsemble, targets: Targets) -> list[str]:
    """What to call the targets, in the order of the heads: hubert.layer-04; hubert+wavlm.layer-04 where they are combined."""
    teachers = [member.teacher for member in members(ensemble)]
    if isinstance(ensemble, Average | Concat):  # by the layers of the first one
        return [f"{'+'.join(teachers)}.{'+'.join(target)}" for target in targets.stores[0].targets]
    stores = zip(teachers, targets.stores, strict=True)
    return [f"{teacher}.{'+'.join(target)}" for teacher, store in stores for target in store.targets]


def next_learner(learner: Learner, phase: Phase) -> Learner:
    """The learner of the next phase: its gates are closed, and what they closed on is gone."""
    assert learner.pruning is not None
    values = learner.pruning.control.close(learner.shape, learner.pruning.gates)
    return _with_student(learner, compact(learner.encoder, values), phase)


def restored(learner: Learner, saved: Saved, phase: Phase) -> Learner:
    """The learner as it was when a state was saved; `learner` is the first one, before its first step."""
    if phase != learner.phase:
        learner = _with_student(learner, Encoder(saved.shape), phase)
    saved.restore(learner, learner.optimizer)
    return learner


def _with_student(learner: Learner, encoder: Encoder, phase: Phase) -> Learner:
    params = learner.params
    encoder.feature_grad_mult = params.train.feature_grad_mult
    return Learner(
        *(params, phase, encoder, learner.predictor, learner.target_weights.tolist(), str(learner.device)),
        *(learner.make_targets, None, learner.world),
    )


def _target_weights(params: StudentParams, groups: Sequence[HeadGroup]) -> list[float]:
    """Of every target: its teacher's share, divided among the targets of that teacher; or as the settings say.

    Raises:
        SettingsError: another number of weights than of targets.
    """
    shares = [group.share / group.heads for group in groups for _ in range(group.heads)]
    given = params.train.target_weights
    if given is None:
        return shares
    if len(given) != len(shares):
        raise SettingsError(f"train.target_weights has {len(given)} entries and there are {len(shares)} targets")
    return list(given)
