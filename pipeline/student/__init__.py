"""The student: its shape, its encoder, its files."""
