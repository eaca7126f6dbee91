"""Which module gets how many slices, and when: scorers, and the allocators that prune and move."""
