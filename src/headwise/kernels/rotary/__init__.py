"""Rotary position embedding: turning pairs of dimensions by an angle that grows with the position."""
