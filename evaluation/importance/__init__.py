"""How important tokens are, by the attention they receive, and what bits they deserve."""
