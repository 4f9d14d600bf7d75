"""What lies beside findings.json, and the checks that stored documents go through."""
