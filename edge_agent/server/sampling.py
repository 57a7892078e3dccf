"""How tokens are drawn for a request: as it says, else the checkpoint, else OpenAI's defaults."""

from __future__ import annotations

from edge_agent.server.schema import Sampled
from edge_agent.text.sampling import MIN_TEMPERATURE, SamplingDefaults, SamplingSettings, either

LEAST_TOP_P = 1e-6  # 0 is the likeliest token alone
SEEDS = 1 << 64


def choose_settings(request: Sampled, defaults: SamplingDefaults, choice: int) -> SamplingSettings:
    """For one choice of a request. Raises SettingsError."""
    temperature = either(request.temperature, defaults.openai_temperature)
    return SamplingSettings(
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        top_k=either(request.top_k, defaults.top_k),
        top_p=max(LEAST_TOP_P, either(request.top_p, defaults.top_p)),
        min_p=either(request.min_p, defaults.min_p),
        typical_p=either(request.typical_p, defaults.typical_p),
        repetition_penalty=either(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=request.logit_bias or {},
        seed=None if request.seed is None else (request.seed + choice) % SEEDS,
    )
