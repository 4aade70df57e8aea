"""The run log and the commit protocol: what is settled, and in which order things happen so that it stays so. Pure.

What must not live here: I/O, clocks, threads (runtime/committer.py and runtime/ledger.py carry out what is decided here),
formats of output files.

names: where things are in a destination. records: what a log segment says. state: what a log amounts to. listing: what was
listed, and how it differs. protocol: the committer's decisions.
"""
