"""Making drafters for a model: a table of n-grams, and a trained layer."""
