"""Scheduling decisions as small pure functions of frozen numbers."""
