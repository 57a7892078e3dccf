"""Checkpoints of any origin, read within themselves."""
