"""The first half: the only package, besides export, that imports transformers."""
