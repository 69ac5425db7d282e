"""Seeds that a person types in: numbers from 0 on, each once."""

import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.seeds import Seeds


def test_seeds_keep_their_order():
    assert TypeAdapter(Seeds).validate_python([2, 0, 1]) == (2, 0, 1)


@pytest.mark.parametrize(
    ("seeds", "told"),
    [([], "at least 1 item"), ([0, -1], "greater than or equal to 0"), ([1, 0, 1], "one of them twice")],
)
def test_what_would_be_no_other_training_is_refused(seeds, told):
    with pytest.raises(ValidationError, match=told):
        TypeAdapter(Seeds).validate_python(seeds)
