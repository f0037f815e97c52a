"""Decoding with fewer passes of the target model, and nothing lost."""
