"""Floor 0: arrays at rest. numpy, Zarr and JSON in, numpy out; no torch."""
