"""Carrying out a run: the driver loop, the committer, the machine, the probe. Decisions are the scheduler's."""
