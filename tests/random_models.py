"""Small models of random weights, saved as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig


def save_random_model(config: PretrainedConfig, directory: Path, **save_options: object) -> Path:
    """A model of random weights, all of them different from their initial values."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, **save_options)
    return directory
