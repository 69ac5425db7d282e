"""Floor 2: one Typer command per DVC stage: read settings, call one function, publish the result."""
