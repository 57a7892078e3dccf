"""Models in other formats than a Hugging Face directory: read, written, cut into files."""
