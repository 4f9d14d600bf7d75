"""Monitors inside other people's training loops: one file a library, which only that file imports."""
