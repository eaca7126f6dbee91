"""Which module gets how many rank slices, and when."""
