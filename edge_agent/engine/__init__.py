"""How an edge has its steps computed."""
