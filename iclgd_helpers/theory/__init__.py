"""Mathematics of the two papers: one gradient step, attention, a small explicit transformer."""
