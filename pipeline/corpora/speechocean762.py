"""The folders of speechocean762 in, its utterances with transcript, phones and speaker out.

    ROOT/train/{wav.scp,utt2spk,text}    ROOT/test/...       Kaldi data directories
    ROOT/resource/text-phone             UTTERANCE.WORD TAB PHONES of one word, as B_B AH0_I T_E

Zhang et al. 2021: native speakers of Mandarin read English. The phones are what the text asks for, in ARPAbet with
stress and without times. Train and test are the official ones, and have no speaker in common.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from cache.errors import DataError
from pipeline.audio import Quarantine
from pipeline.corpora.drawn import DrawnTrials
from pipeline.corpora.folder import corpus_root, folders
from pipeline.corpora.item import Item
from pipeline.corpora.kaldi import directory_items
from pipeline.corpora.lists import keyed_lines, list_file
from pipeline.corpora.splits import Fractions, WithinSpeakers, split_alone, split_within

POSITIONS = ("_B", "_I", "_E", "_S")  # of a phone in its word: begin, inside, end, single


class Speechocean762Params(BaseModel, frozen=True, extra="forbid"):
    """speechocean762, or a part of it."""

    kind: Literal["speechocean762"]
    """Folders as the archive of OpenSLR 101 unpacks."""
    root: str
    """The folder that holds WAVE and resource; may name a variable of the environment: $SPEECH/speechocean762."""
    subsets: tuple[Literal["train", "test"], ...] = Field(min_length=1)
    dev_speakers: float = Field(ge=0, le=0.5)
    """Part of the training speakers that is dev instead; the corpus has no dev."""
    stress: Literal["keep", "drop"]
    """Whether vowels keep the digit of their stress: AH0 or AH."""
    sid: WithinSpeakers | None
    """Speaker identification; null leaves that task out."""
    asr: bool
    """Whether all utterances take part in speech recognition."""
    sv: DrawnTrials | None
    """Speaker verification, in the splits of pretraining; null leaves that task out."""


def speechocean762_items(corpus: str, params: Speechocean762Params) -> Iterator[Item]:
    """The utterances, by subset as listed, in the corpus' order; phone recognition (pr) has the splits of pretraining.

    Raises:
        DataError: a folder or list that is missing, or a line that cannot be used.
    """
    root = corpus_root(corpus, params.root)
    phones = read_phones(list_file(root, "resource/text-phone", f"prepare.sources.{corpus}.root"), params.stress)
    for subset in params.subsets:
        if not (root / subset).is_dir():
            there = ", ".join(f.name for f in folders(root)) or "no folder"
            raise DataError(f"{root} has no subset {subset!r}, but {there}; correct prepare.sources.{corpus}.subsets")
    for subset in params.subsets:
        items = [with_phones(item, phones) for item in directory_items(corpus, root, subset, subset)]
        sid = split_within({i.id: i.speaker for i in items if isinstance(i.audio, Path)}, params.sid)
        for item in items:
            split = item.split
            if split == "train":
                dev = Fractions(dev=params.dev_speakers, test=0)
                split = split_alone(f"speechocean762 speaker {item.speaker}", dev)
            tasks = dict.fromkeys(["pr"] + ["asr"] * params.asr + ["sv"] * (params.sv is not None), split)
            tasks |= {"sid": sid[item.id]} if item.id in sid else {}
            yield replace(item, split=split, tasks=tasks)


def with_phones(item: Item, phones: dict[str, list[str]]) -> Item:
    """The utterance with its phones; quarantined where words and their phones are not equally many."""
    words = phones.get(item.id.split("/", 1)[1], [])
    wanted = len((item.text or "").split())
    audio = item.audio
    if isinstance(audio, Path) and len(words) != wanted:
        audio = Quarantine(f"no phones: resource/text-phone has {len(words)} of its {wanted} words")
    return replace(item, audio=audio, pronunciation=" ".join(words) or None)


def read_phones(file: Path, stress: Literal["keep", "drop"]) -> dict[str, list[str]]:
    """The phones of each word of each utterance.

    Raises:
        DataError: a line that is not an utterance, the number of its word, and phones; or words out of order.
    """
    words: dict[str, list[str]] = {}
    for line, key, rest in keyed_lines(file):
        name, _, number = key.rpartition(".")
        symbols = rest.split()
        if not name or not number.isdecimal() or not symbols or not all(s.endswith(POSITIONS) for s in symbols):
            raise DataError(
                f"{line.where}: {line.text[:60]!r} is not UTTERANCE.WORD and phones like B_B AH0_I T_E; mend it"
            )
        spoken = words.setdefault(name, [])
        if int(number) != len(spoken):
            raise DataError(f"{line.where}: word {number} of {name} where word {len(spoken)} is due; put them in order")
        phones = (symbol[:-2] for symbol in symbols)
        spoken.append(" ".join(p.rstrip("012") if stress == "drop" else p for p in phones))
    return words
