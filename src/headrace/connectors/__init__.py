"""Connectors: sources read objects into Arrow blocks, sinks write blocks to a destination.

`storage` reaches bytes (local files, S3), `listing` turns what the user wrote into objects, `packing` turns objects into
splits, `blocks` cuts and casts record batches. Nothing here knows the plan, the scheduler or a worker.
"""
