"""Boundary codecs: what a row of hidden states becomes on the wire, from its name to its bytes."""
