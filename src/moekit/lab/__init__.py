"""Labs: several configurations over several seeds on the same data, and what came out of them."""
