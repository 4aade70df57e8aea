"""Sinks: one file a format over `files`, which owns names, staging and the end of a run; `manifest` is what it leaves."""
