"""What is kept of sessions, and where."""
