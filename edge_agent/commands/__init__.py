"""What `midspan ask` and `midspan image` do."""
