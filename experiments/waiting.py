"""Imported before torch by every command here: threads that wait for each other sleep instead of spinning.

OpenMP reads OMP_WAIT_POLICY once, when torch loads it. On a busy machine threads that spin hold the core that the
thread they wait for needs: two runs of two threads each took 0.87 s a step on two cores, and 0.30 s with this. A single
run on an idle machine loses nothing.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
