"""The scheduler: a pure state machine. `Scheduler.handle(event, now) -> [command]`.

It owns every decision (which split opens, which worker does what, who gets memory, when the run is over) and does
no I/O, reads no clock, starts no thread and knows no pyarrow.
"""
