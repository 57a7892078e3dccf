"""Breaks pools on purpose."""
