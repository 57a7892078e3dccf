"""`midspan loadtest`: many sessions at once, and what they had to wait for."""
