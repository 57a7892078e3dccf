"""The worker's loop and what keeps it fair."""
