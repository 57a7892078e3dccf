"""A model cut into head, middle and tail."""
