"""Does a small language model learn to think, from text in which nobody shows their steps? `qstar proof`."""
