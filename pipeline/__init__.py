"""Floor 1: the science. Torch in, torch out; no command line, no params.yaml, no DVC."""
