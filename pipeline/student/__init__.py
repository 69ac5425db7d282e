"""Students: a shape in, an encoder with trained weights out; nothing here knows a teacher object."""
