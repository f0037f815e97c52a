"""Fewer bits a number: quantized weights, activations and caches."""
