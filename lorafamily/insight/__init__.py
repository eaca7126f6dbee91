"""What adapters are and where the rank went, as data, tables and pictures."""
