"""Measurements of speed, memory and rank choices. Every file is a command, but measuring.py, which they share."""
