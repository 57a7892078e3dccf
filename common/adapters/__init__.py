"""Changes to a checkpoint's weights that come in files of their own."""
