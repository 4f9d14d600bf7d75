"""Data sets that are read from their beginning, as they come: shards of pictures without a listing."""
