"""A pronouncing dictionary in, the phones of each word and of whole transcripts out.

    WORD PHONES             one pronunciation a line, the first of a word is taken; case does not matter
    WORD(2) PHONES          a further one, as CMUdict writes it; LibriSpeech's lexicon (OpenSLR 11) repeats WORD
    ;;; or # ...            a comment; # also at the end of a line

SUPERB takes its phones from such a lexicon, too: what is recognised is how a word is said by the book.
"""

import re
from typing import Literal

from pydantic import BaseModel

from cache.errors import DataError
from pipeline.corpora.folder import expand_root
from pipeline.corpora.lists import lines_of

VARIANT = re.compile(r"\(\d+\)$")
STRESS = re.compile(r"[012]$")


class LexiconParams(BaseModel, frozen=True, extra="forbid"):
    """Where words get their phones from."""

    path: str
    """A file of words and ARPAbet phones; may name a variable of the environment: $SPEECH/librispeech-lexicon.txt."""
    stress: Literal["keep", "drop"]
    """Whether vowels keep the digit of their stress: AH0 or AH."""


def read_lexicon(corpus: str, params: LexiconParams) -> dict[str, str]:
    """The phones of every word, apart by spaces; words in capitals.

    Raises:
        DataError: there is no such file, or a line without phones.
    """
    file = expand_root(corpus, params.path, "lexicon.path")
    if not file.is_file():
        raise DataError(
            f"prepare.sources.{corpus}.lexicon.path: there is no file {file}; correct it or get the lexicon"
        )
    lexicon: dict[str, str] = {}
    for line in lines_of(file):
        if line.text.startswith(";;;"):
            continue
        word, *phones = re.split(r"(?:^|\s)#", line.text, maxsplit=1)[0].split() or [""]
        if not word:
            continue
        if not phones:
            raise DataError(f"{line.where}: {line.text[:40]!r} is not a word and its phones; mend or remove the line")
        if params.stress == "drop":
            phones = [STRESS.sub("", phone) for phone in phones]
        lexicon.setdefault(VARIANT.sub("", word).upper(), " ".join(phones))
    return lexicon


def pronounced(text: str | None, lexicon: dict[str, str]) -> str | None:
    """The phones of a transcript, or None where it has a word that is not in the lexicon."""
    words = [lexicon.get(word) for word in (text or "").upper().split()]
    known = [word for word in words if word is not None]
    return " ".join(known) if known and len(known) == len(words) else None
