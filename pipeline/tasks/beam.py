"""Log probabilities of characters and a word n-gram model in, the best sequence of words out: a beam search.

flashlight-text searches and its KenLM weighs the words, as in s3prl's decoder: paths through a lexicon of spellings, the
best alignment of each, log P(characters) + w log10 P(words) + b (number of words). The lexicon is the vocabulary of
the model, so a word that it does not have is never answered.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, Field

from cache.errors import DataError
from pipeline.extras import from_extra
from pipeline.tasks.characters import Alphabet
from pipeline.tasks.kneserney import UNKNOWN, arpa, estimate
from pipeline.tasks.phones import BLANK

THRESHOLD = 25.0
"""Paths that are so far behind the best are given up, as in s3prl."""


class TrainTexts(BaseModel, frozen=True, extra="forbid"):
    """A model of the training texts, smoothed by interpolated Kneser-Ney."""

    kind: Literal["train"]
    """Nothing beside the corpus is needed; its words are all that can be answered."""
    order: int = Field(ge=2, le=6)
    """Words that are looked at together; KenLM has no models of single words."""


class ArpaFile(BaseModel, frozen=True, extra="forbid"):
    """A model from elsewhere, such as LibriSpeech's 4-gram (OpenSLR 11), which SUPERB's ASR with LM has."""

    kind: Literal["arpa"]
    path: str
    """In the ARPA format, upper or lower case as it is: its words are put into upper case."""


class BeamParams(BaseModel, frozen=True, extra="forbid"):
    """A beam search with a language model."""

    lm: Annotated[TrainTexts | ArpaFile, Field(discriminator="kind")]
    """Where the language model comes from."""
    width: int = Field(ge=1)
    """Paths that are kept; s3prl's example: 5."""
    lm_weights: tuple[float, ...] = Field(min_length=1)
    """Weights of the language model to try on dev, for log10 probabilities; s3prl's example: 2."""
    word_bonuses: tuple[float, ...] = Field(min_length=1)
    """What a word more brings, to try on dev; s3prl's example: -1."""


class Weights(NamedTuple):
    """What is tuned on dev."""

    lm: float
    word: float


class Beam:
    """One language model and its lexicon."""

    def __init__(self, params: BeamParams, alphabet: Alphabet, texts: Sequence[str]) -> None:
        """Read or estimate the model.

        Raises:
            SettingsError: the extra `beam` is not installed.
            DataError: the file is not there, is no ARPA file, or has no word that can be spelled.
        """
        module = partial(from_extra, extra="beam")
        self._text = module("flashlight.lib.text.decoder")
        dictionary = module("flashlight.lib.text.dictionary")
        kenlm = module("flashlight.lib.text.decoder.kenlm")
        with TemporaryDirectory() as folder:
            if isinstance(params.lm, TrainTexts):
                path = Path(folder) / "train.arpa"
                path.write_text(arpa(estimate(texts, params.lm.order)), encoding="utf-8")
            else:
                path = Path(params.lm.path)
            words = vocabulary(path)
            spelled = [word for word in words if set(word.upper()) <= set(alphabet.characters)]
            if not spelled:
                raise DataError(
                    f"{path}: none of its {len(words)} words is made of the characters of the task; "
                    "give another probes.asr.beam.lm"
                )
            self._words = dictionary.Dictionary([*spelled, UNKNOWN])
            try:
                with quiet():
                    self._model = kenlm.KenLM(str(path), self._words)  # it is read here, the file may go
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1]
                raise DataError(f"{path}: KenLM cannot read it ({reason}); correct probes.asr.beam.lm.path") from None
        self.words = frozenset(word.upper() for word in spelled)
        self.grid = tuple(Weights(lm, word) for lm in params.lm_weights for word in params.word_bonuses)
        self._alphabet, self._width = alphabet, params.width
        self._trie = self._text.Trie(len(alphabet), alphabet.space)
        start = self._model.start(False)
        for word in spelled:
            number = self._words.get_index(word)
            self._trie.insert(list(alphabet.spell(word.upper())), number, self._model.score(start, number)[1])
        self._trie.smear(self._text.SmearingMode.MAX)

    def answers(self, utterances: Sequence[Float[np.ndarray, "_ K"]], weights: Weights) -> list[str]:
        """The best words of every utterance."""
        decoder = self._decoder(weights)
        return [self._answer(decoder, log_probs)[0] for log_probs in utterances]

    def best(self, log_probs: Float[np.ndarray, "T K"], weights: Weights) -> tuple[str, float]:
        """The best words of one utterance and the score of their best alignment."""
        return self._answer(self._decoder(weights), log_probs)

    def log10(self, text: str) -> float:
        """What the model thinks of a whole text."""
        state, total = self._model.start(False), 0.0
        for word in text.split():
            state, score = self._model.score(state, self._words.get_index(word))
            total += score
        return total + float(self._model.finish(state)[1])

    def _decoder(self, weights: Weights) -> Any:
        options = self._text.LexiconDecoderOptions(
            self._width,
            len(self._alphabet),  # every character is tried after every path
            THRESHOLD,
            weights.lm,
            weights.word,
            -np.inf,  # no unknown word
            0.0,
            False,  # the best alignment counts, not their sum
            self._text.CriterionType.CTC,
        )
        unknown = self._words.get_index(UNKNOWN)
        return self._text.LexiconDecoder(
            options, self._trie, self._model, self._alphabet.space, BLANK, unknown, [], False
        )

    def _answer(self, decoder: Any, log_probs: Float[np.ndarray, "T K"]) -> tuple[str, float]:
        rows = np.ascontiguousarray(log_probs, dtype=np.float32)
        best = decoder.decode(rows.ctypes.data, *rows.shape)[0]
        return " ".join(self._words.get_entry(number).upper() for number in best.words if number >= 0), best.score


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what a library in C++ writes about its progress away from the terminal; what fails is raised."""
    terminal = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def vocabulary(path: Path) -> list[str]:
    """The words of an ARPA file, without the marks of sentences and of unknown words.

    Raises:
        DataError: no such file, or not that format.
    """
    try:
        lines = path.open(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; correct probes.asr.beam.lm.path") from None
    words, inside = [], False
    with lines:
        try:
            for line in lines:
                if line.startswith("\\"):
                    if inside:
                        break
                    inside = line.strip() == "\\1-grams:"
                elif inside and line.strip():
                    words.append(line.split()[1])
        except (UnicodeDecodeError, IndexError):
            words = []
    if not words:
        raise DataError(
            f"{path}: it has no \\1-grams: of the ARPA format; unpack it, or correct probes.asr.beam.lm.path"
        )
    return [word for word in words if word.upper() not in ("<S>", "</S>", "<UNK>")]
