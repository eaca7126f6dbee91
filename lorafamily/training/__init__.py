"""The one loop, and the optimiser's surgery when ranks change."""
