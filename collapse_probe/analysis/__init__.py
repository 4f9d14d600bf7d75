"""The verbs: analyze, compare, intervene."""
