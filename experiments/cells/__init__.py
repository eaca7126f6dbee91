"""The cells of a comparison: which there are (settings), how one is run (cell), how all are run (sweep)."""
