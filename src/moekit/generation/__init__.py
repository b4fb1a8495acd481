"""Continue text with a model: sampling, the loop over tokens, and text in and out."""
