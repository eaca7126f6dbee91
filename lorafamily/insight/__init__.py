"""Seeing what adapters are and where the rank went."""
