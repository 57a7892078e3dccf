"""Measures quality against bytes."""
