"""Losses against collapse: one file, one penalty."""
