"""Draw how the embedded model learns to think, by one knob of the method at a time."""
