"""Models as pure functions: one configurable decoder, its attention and cache."""
