"""The parts put together: the front door, a whole pool on one machine, the demo."""
