"""Tests of the launcher: the data, the command line, whole runs, and the comparison of runs."""
