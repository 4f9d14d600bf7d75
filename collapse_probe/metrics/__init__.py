"""The metrics: one file, one idea; each ends with its entry in `METRICS`."""
