"""A place for what one forward of a model leaves for its later steps, another one in each thread that runs the model.

Hooks and norms of a model have no other way to learn, say, how long the utterances of this batch are; and several batches
may go through one model at a time.
"""

import threading
from typing import Any


class PerThread(threading.local):
    """`value` is None in every thread that has not set it. A copy of a model begins with None, too."""

    value: Any = None

    def __reduce__(self) -> tuple[type["PerThread"], tuple[()]]:
        return PerThread, ()
