"""The seeds that a person types in, several trainings of one kind out: numbers from 0 on, each once."""

from typing import Annotated

from pydantic import AfterValidator, Field


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("seeds has one of them twice, which would be the same training; name each once")
    return seeds


Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_each_once)]
"""A spread over one seed named twice would be none."""
