"""Techniques that make language models cheap, as pure functions in JAX."""
