"""Drafting: guessing a session's next tokens on the device, to have several checked in one step."""
