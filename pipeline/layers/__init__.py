"""Layers of teachers: receipts in, what a student is to predict out."""
