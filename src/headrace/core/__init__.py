"""Words that every layer shares: splits, blocks, steps, receipts, events, errors, options.

Nothing here does I/O, reads a clock or starts a thread. Only `tensors` imports pyarrow, so that the
scheduler and the commit protocol, which import the rest, stay pure.
"""
