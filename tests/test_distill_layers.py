"""What layer-to-layer methods minimise, worked out in float64 from their equations."""

import numpy as np
import pytest
import torch

from cache.codecs import CODECS, decode
from cache.receipts import open_receipt
from pipeline.distill.batches import BatchReader
from pipeline.distill.build import first_learner, target_names
from pipeline.distill.ensemble import TargetMaker
from pipeline.distill.plan import Item
from pipeline.distill.settings import StudentParams
from pipeline.layers.choose import choose_targets
from pipeline.layers.targets import open_init, open_targets
from pipeline.padding import INT16_SCALE
from tests.methods_fixtures import make_methods, student_of

UTTERANCES = (0, 7, 3)


@pytest.fixture(scope="module")
def world(shared_root):
    return make_methods(shared_root)


class Drawn:
    """A student with random linears on one padded batch, and everything in float64 utterance by utterance."""

    def __init__(self, world, method, **changes):
        params = StudentParams.model_validate({**student_of(method), "prune": None, **changes})
        targets = choose_targets(
            params.ensemble, world.root / "receipts", params.init, world.root / "init", world.root / "similarity"
        )
        stores = open_targets(targets)
        init = open_init(targets, params.init, world.root / "init")
        maker = TargetMaker(params.ensemble, targets, stores, "cpu")
        self.learner = first_learner(params, targets, init, "cpu", maker).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.learner.predictor.parameters():
                parameter.normal_(std=0.3, generator=generator)
        waves = open_receipt(world.root / "receipts/waves.json")
        reader = BatchReader(world.manifest, waves, stores, [list(store.arrays) for store in targets.stores])
        self.batch = reader.read_clean([Item(u, None) for u in UTTERANCES])
        self.counts = self.batch.frames.tolist()
        assert len(set(self.counts)) == len(UTTERANCES)  # there is padding
        with torch.no_grad():
            self.states = self.learner.encoder(self.batch.waves.float() * INT16_SCALE, self.batch.samples)
        self.teacher = open_receipt(world.root / "receipts/hubert.json")
        self.names = target_names(params.ensemble, targets)
        self.terms = self.learner.evaluate([self.batch], self.names)

    def student(self, layer):
        """Frames of a layer of the student in float64: (F, D) of all utterances, one after the other."""
        state = self.states.projection if layer == "projection" else self.states.hidden[layer]
        return np.concatenate([state[b, :count].double().numpy() for b, count in enumerate(self.counts)])

    def linear(self, number, x):
        """W x + b of one of the linear layers."""
        linear = self.learner.predictor.linears[number]
        return x @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()

    def target(self, layer):
        """Frames of a layer of the teacher in float64."""
        array = "projection" if layer == "projection" else f"layer-{layer:02d}"
        rows = [decode(self.teacher.read(array, u), CODECS["float16"], {}) for u in UTTERANCES]
        return np.concatenate(rows).astype(np.float64)


def l1(p, h):
    """mean over t and d of |p - h|."""
    return np.abs(p - h).mean()


def cosine(p, h):
    """mean over t of cos(p, h)."""
    return ((p * h).sum(1) / np.sqrt((p * p).sum(1) * (h * h).sum(1))).mean()


def test_dphubert_is_the_mean_over_four_layers_of_l1_minus_cosine(world):
    drawn = Drawn(world, "dphubert")
    assert len(drawn.learner.predictor.linears) == 2
    # layer 0 is what stands before the positional convolution and has a linear of its own; the others share one
    pairs = [
        (drawn.linear(linear, drawn.student(layer)), drawn.target(layer))
        for layer, linear in (("projection", 0), (1, 1), (2, 1), (3, 1))
    ]
    wanted = [l1(p, h) - cosine(p, h) for p, h in pairs]
    assert drawn.terms["l1"] == pytest.approx(np.mean([l1(p, h) for p, h in pairs]), abs=1e-6)
    assert drawn.terms["cosine"] == pytest.approx(-np.mean([cosine(p, h) for p, h in pairs]), abs=1e-6)
    assert drawn.terms["total"] == pytest.approx(np.mean(wanted), abs=1e-6)
    assert [drawn.terms[name] for name in drawn.names] == pytest.approx(wanted, abs=1e-6)


def test_fithubert_is_the_weighted_sum_of_squared_errors_of_all_layers(world):
    drawn = Drawn(world, "fithubert")
    assert drawn.learner.encoder.shape.width == 12
    assert len(drawn.learner.predictor.linears) == 3
    errors = [
        np.square(drawn.linear(number, drawn.student(layer)) - drawn.target(layer)).mean()
        for number, layer in enumerate((1, 2, 3))
    ]
    assert drawn.terms["total"] == pytest.approx(0.1 * errors[0] + 0.1 * errors[1] + 1.0 * errors[2], abs=1e-6)
    assert drawn.terms["total"] == pytest.approx(drawn.terms["l2"], rel=1e-6)
    assert [drawn.terms[name] for name in drawn.names] == pytest.approx(errors, abs=1e-6)  # told without their weights


@pytest.mark.parametrize("several", ["mean", "last"])
def test_skill_compares_the_means_of_groups_on_both_sides(world, several):
    predict = {**student_of("skill")["predict"], "several": several, "linears": "each"}
    drawn = Drawn(world, "skill", predict=predict)
    groups = [(1, 3), (2,)]  # by the similarity in the fixtures; layer 0 is left out
    wanted = []
    for number, group in enumerate(groups):
        own = group if several == "mean" else group[-1:]
        p = drawn.linear(number, np.mean([drawn.student(layer) for layer in own], axis=0))
        h = np.mean([drawn.target(layer) for layer in group], axis=0)
        wanted.append(l1(p, h) - cosine(p, h))
    assert [drawn.terms[name] for name in drawn.names] == pytest.approx(wanted, abs=1e-6)
    assert drawn.terms["total"] == pytest.approx(np.mean(wanted), abs=1e-6)


def test_a_deeper_teacher_is_met_by_the_layers_that_are_listed(world):
    shape = {**student_of("dphubert")["shape"], "heads": [2, 2], "ffn": [24, 24]}
    predict = {"kind": "layers", "student": [0, [1, 2]], "several": "mean", "linears": "one"}
    ensemble = {"kind": "single", "teacher": "hubert", "layers": [1, 3], "normalise": None}
    drawn = Drawn(world, "dphubert", shape=shape, predict=predict, ensemble=ensemble)
    states = [drawn.student(0), (drawn.student(1) + drawn.student(2)) / 2]
    pairs = [(drawn.linear(0, state), drawn.target(layer)) for state, layer in zip(states, (1, 3), strict=True)]
    assert drawn.terms["total"] == pytest.approx(np.mean([l1(p, h) - cosine(p, h) for p, h in pairs]), abs=1e-6)
