"""The errors a user can cause: each is one line for the terminal and one exit code.

| exit code | class | what went wrong |
|---|---|---|
| 2 | `SettingsError` | something a person typed: an option, a key of params.yaml, a value |
| 3 | `DataError` | a corpus, a recording, a manifest |
| 4 | `StoreError` | a store or a model on disk: missing, unfinished, damaged, or made from something else |
| 5 | `ResourceError` | the machine: disk full, no permission, a lock held by another process |
| 75 | `Interrupted` | stopped on request with its state saved: the same command goes on |
"""


class DecantError(Exception):
    """Base of all of them; the message names the thing, the value and the way out."""

    exit_code = 1


class SettingsError(DecantError):
    """A setting that cannot be obeyed."""

    exit_code = 2


class DataError(DecantError):
    """Input data that cannot be used."""

    exit_code = 3


class StoreError(DecantError):
    """A product on disk that is missing, unfinished, damaged or stale."""

    exit_code = 4


class ResourceError(DecantError):
    """The machine refuses: space, permission, or a lock."""

    exit_code = 5


class Interrupted(DecantError):
    """Stopped by a signal with the state saved (EX_TEMPFAIL: try again)."""

    exit_code = 75
