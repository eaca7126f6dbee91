"""The one training loop, the session that any other loop can hold, and what both stand on."""
