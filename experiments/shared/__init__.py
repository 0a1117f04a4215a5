"""Share between the studies: command line, training, intervals and figures."""
