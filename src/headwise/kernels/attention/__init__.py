"""Softmax attention: `naive` forms every score, `sdpa` runs torch's fused kernel in linear memory."""
