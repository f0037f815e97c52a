"""One bit: binary layers and their straight-through gradients."""
