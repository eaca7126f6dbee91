"""Measurements of speed, memory and rank choices. Every file is a command, except measuring.py, which they share."""
