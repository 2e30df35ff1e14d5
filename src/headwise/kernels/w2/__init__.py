"""Scores by the squared distance of query and key: `naive` forms each distance, `fast` takes inner products."""
