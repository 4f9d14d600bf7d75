"""Pictures that are no files on this disk: shards that are read as they come, and files behind addresses."""
