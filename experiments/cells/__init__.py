"""What a table is made of: which cells there are (settings), one of them (cell), all of them side by side (sweep)."""
