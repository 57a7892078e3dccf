"""What goes over the wire; no torch."""
