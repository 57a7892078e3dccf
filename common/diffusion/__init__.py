"""SDXL's UNet in parts, its tensors and schedulers."""
