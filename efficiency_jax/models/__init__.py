"""Models as pure functions: one decoder, its attention and its cache."""
