"""Where the numbers and pictures of a training go: one file a library, which only that file imports, when a log is opened."""
