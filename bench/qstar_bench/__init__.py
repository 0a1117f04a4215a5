"""The measurements, reached as `qstar bench ...`."""
