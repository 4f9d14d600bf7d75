"""The command line; installed as `collapse_probe.cli`."""
