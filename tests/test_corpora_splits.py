"""Names into train, dev and test."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpora.splits import Fractions, split_alone, split_together, stable_place

FRACTIONS = Fractions(dev=0.1, test=0.2)


def test_places_do_not_change_between_versions():
    # printf decant | sha256sum: e23b1aaf4f40...
    assert stable_place("decant") == pytest.approx(0xE23B1AAF4F40 / 2**48, abs=1e-14)


def test_fractions_hold_on_average_and_adding_names_moves_none():
    before = {f"n{i}": split_alone(f"n{i}", FRACTIONS) for i in range(5_000)}
    assert list(before.values()).count("test") / 5_000 == pytest.approx(0.2, abs=0.02)
    assert list(before.values()).count("dev") / 5_000 == pytest.approx(0.1, abs=0.02)
    assert all(split_alone(name, FRACTIONS) == split for name, split in before.items())


@given(st.sets(st.text(min_size=1), max_size=40), st.floats(0, 0.5), st.floats(0, 0.5))
def test_sharing_out_is_whole_and_keeps_one_for_training(names, dev, test):
    splits = split_together(names, Fractions(dev=dev, test=test))
    assert set(splits) == names
    count = list(splits.values()).count
    assert not names or count("train") >= 1
    if len(names) >= 3:
        assert count("test") == (max(1, min(round(len(names) * test), len(names) - 1)) if test else 0)
        assert (count("dev") > 0) == (dev > 0 and len(names) - count("test") > 1)


def test_sharing_out_does_not_depend_on_the_order_of_names():
    names = [f"u{i}" for i in range(20)]
    assert split_together(names, FRACTIONS) == split_together(reversed(names), FRACTIONS)
    assert sorted(split_together(names, FRACTIONS).values()) == ["dev"] * 2 + ["test"] * 4 + ["train"] * 14
