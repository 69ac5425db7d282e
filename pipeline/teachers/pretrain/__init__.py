"""Pretraining of teachers, from scratch or from another teacher: `settings` what a person types, `run` what happens."""
