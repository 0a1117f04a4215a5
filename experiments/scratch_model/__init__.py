"""Ask whether a small model learns to think from text in which nobody shows their steps."""
