"""How well a model predicts text: loss, perplexity, bits per byte, and what a compressor needs."""
