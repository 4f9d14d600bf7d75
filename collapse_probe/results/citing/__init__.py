"""What to cite for results: the papers behind metrics, presets and fixes, and a paragraph on how it was measured."""
