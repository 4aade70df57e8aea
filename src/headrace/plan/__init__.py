"""Logical plan, rules and stages. Pure: no I/O, no clock, no threads."""
