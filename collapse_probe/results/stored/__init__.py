"""The arrays that lie beside findings.json."""
