"""Sinks: one file a format over `files`, which owns names, staging and publishing; `destination` reaches the storage."""
