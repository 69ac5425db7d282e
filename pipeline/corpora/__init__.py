"""Corpora: labels and audio in their own layouts in, items with ids and splits out."""
