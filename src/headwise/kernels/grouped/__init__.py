"""Mixtures of experts: `naive` gives every token to every expert, `fast` each expert its own tokens only."""
