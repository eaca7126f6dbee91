"""Searches for what breaks: killed processes, damaged files, other people's models and loading code."""
