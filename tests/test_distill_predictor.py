"""Layer to layer: which states of a student meet which target, through which linear layer."""

import pytest
import torch
from pydantic import TypeAdapter

from cache.errors import SettingsError
from pipeline.distill.predictor import LayerToLayer, Predict, make_predictor
from pipeline.layers.ensembles import HeadGroup
from pipeline.student.encoder import Encoder, initialise
from pipeline.student.shape import EncoderShape
from tests.distill_fixtures import SHAPE

STUDENT = EncoderShape.model_validate(SHAPE)
DPHUBERT = {"kind": "layers", "student": "same", "several": "mean", "linears": [[0], [1, 2, 3]]}


def settings(**changes) -> LayerToLayer:
    return TypeAdapter(Predict).validate_python({**DPHUBERT, **changes})


@pytest.fixture(scope="module")
def student():
    encoder = Encoder(STUDENT)
    initialise(encoder, torch.Generator().manual_seed(0))
    encoder.eval()
    waves = torch.randn(2, 4_000, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = encoder(waves, torch.tensor([4_000, 3_000]))
    return states, encoder.read_out(states)


def predictor(params, groups, targets):
    return make_predictor(params, STUDENT, groups, targets, torch.Generator().manual_seed(2))


def test_before_the_first_step_the_linears_pass_the_students_own_layers_on(student):
    states, last = student
    linears = predictor(settings(), [HeadGroup(4, 16, 1.0)], [("projection",), (1,), (2,), (3,)])
    (made,) = linears(states, last)
    wanted = torch.stack([states.projection, *states.hidden[1:]], dim=1)
    torch.testing.assert_close(made, wanted)
    assert len(linears.linears) == 2


def test_targets_of_one_list_share_their_linear_and_others_do_not(student):
    states, last = student
    linears = predictor(settings(), [HeadGroup(4, 16, 1.0)], [("projection",), (1,), (2,), (3,)])
    with torch.no_grad():
        linears.linears[1].bias += 1.0
    (made,) = linears(states, last)
    torch.testing.assert_close(made[:, 0], states.projection)
    torch.testing.assert_close(made[:, 1:], torch.stack(states.hidden[1:], dim=1) + 1.0)


@pytest.mark.parametrize(("several", "wanted"), [("mean", (1, 2, 3)), ("last", (3,))])
def test_a_group_of_layers_meets_the_mean_of_the_students_or_the_last_of_them(student, several, wanted):
    states, last = student
    linears = predictor(settings(several=several, linears="one"), [HeadGroup(1, 16, 1.0)], [(1, 2, 3)])
    (made,) = linears(states, last)
    torch.testing.assert_close(made[:, 0], torch.stack([states.hidden[n] for n in wanted]).mean(0))


def test_listed_layers_take_the_place_of_the_teachers_numbers(student):
    states, last = student
    listed = settings(student=[1, [2, 3]], linears="each")
    (made,) = predictor(listed, [HeadGroup(2, 16, 1.0)], [(6,), (12,)])(states, last)
    torch.testing.assert_close(made[:, 1], (states.hidden[2] + states.hidden[3]) / 2)
    torch.testing.assert_close(made[:, 0], states.hidden[1])


def test_teachers_of_other_widths_get_linears_of_their_own_width(student):
    states, last = student
    groups = [HeadGroup(1, 16, 0.5), HeadGroup(2, 12, 0.5)]
    linears = predictor(settings(linears=[[0], [1, 2]]), groups, [(1,), (2,), (3,)])
    first, second = linears(states, last)
    assert (first.shape[1:2] + first.shape[3:], second.shape[1:2] + second.shape[3:]) == ((1, 16), (2, 12))
    wide = torch.nn.functional.linear(states.hidden[3], linears.linears[1].weight, linears.linears[1].bias)
    torch.testing.assert_close(second[:, 1], wide)
    again = predictor(settings(linears=[[0], [1, 2]]), groups, [(1,), (2,), (3,)])
    assert torch.equal(again.linears[1].weight, linears.linears[1].weight)


@pytest.mark.parametrize(
    ("changes", "targets", "said"),
    [
        ({}, [("projection",), (1,), (2,), (4,)], "asks for layer 4 of a student with layers 0 to 3"),
        ({"student": [1, 2]}, [(1,), (2,), (3,), (0,)], "lists 2 entries and there are 4 targets"),
        ({"linears": [[0], [1, 2]]}, [(1,), (2,), (3,), (0,)], r"names targets \[0, 1, 2\] and there are 4"),
    ],
)
def test_what_does_not_fit_is_refused(changes, targets, said):
    with pytest.raises(SettingsError, match=said):
        predictor(settings(**changes), [HeadGroup(4, 16, 1.0)], targets)


def test_one_linear_cannot_serve_two_widths():
    groups = [HeadGroup(1, 16, 0.5), HeadGroup(1, 12, 0.5)]
    with pytest.raises(SettingsError, match="different widths"):
        predictor(settings(linears="one"), groups, [(1,), (2,)])
