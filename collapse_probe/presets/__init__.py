"""The choices of each paper, fixed: one file, one preset; each ends with its entry in `PRESETS`."""
