"""What is watched while it runs: numbers for Prometheus, over HTTP."""
