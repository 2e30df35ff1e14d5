"""Attention to a pattern of keys: `naive` says which key a query sees, `blocks`, `dilated` and `strided` form no other
score (but for what a block at a pattern's edge brings along)."""
