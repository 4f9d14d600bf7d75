"""What a notebook shows of results: cards, and figures of matplotlib."""
