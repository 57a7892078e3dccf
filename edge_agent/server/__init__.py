"""The OpenAI-compatible endpoint: requests in, answers of one engine out."""
