"""What the experts of a trained model do: which text goes where, and how even the load is."""
