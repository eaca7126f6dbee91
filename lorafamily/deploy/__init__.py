"""Getting the trained update out: merged into the weights, or as a small file."""
