"""The report: every product of a run in, one self-contained page out."""
