"""Checks beyond the tests: killed processes, damaged files, other people's models and loading code."""
