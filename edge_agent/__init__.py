"""The edge agent: tokenizer, first and last layers, sampler, and the client of the pool."""
