"""What people see of a run: the progress line, plain log lines, and the Run with its report.

Observers subscribe to core/events.py and read nothing else; the engine does not know that they exist.
"""
