"""The transformer around the mixture of experts: norms, positions, attention, cache, blocks, heads."""
