"""Where models come from: one file a place; each ends with its entry in `SOURCES`."""
