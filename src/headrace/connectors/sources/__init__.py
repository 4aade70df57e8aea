"""Sources: one file a format. Each follows contracts/source.py; shared parts are in `files` and `lines`."""
