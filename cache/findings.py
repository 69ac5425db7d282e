"""What can be wrong with a store: the words that `cache.verify` finds and `cache.repair` acts on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["header", "column", "metadata", "table", "journal", "receipt", "missing", "damaged", "swapped", "extra"]
Remark = Literal["unfinished", "leftover"]  # no damage: what a killed run leaves and the next one clears


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    kind: Kind | Remark
    place: str
    """File, relative to the store; a receipt's own path."""
    detail: str
    array: str | None = None
    shard: int | None = None
    committed: tuple[int, str] | None = None
    """What a receipt says the shard is, where the file is just that and the journal is wrong."""

    @property
    def damage(self) -> bool:
        """Whether the store must not be used as it is."""
        return self.kind not in ("unfinished", "leftover")


@dataclass
class Verdict:
    """What was looked at in one store, and what was found."""

    directory: Path
    full: bool
    shards: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def damage(self) -> list[Finding]:
        """The findings that are damage."""
        return [f for f in self.findings if f.damage]
