"""Workers as processes of this machine (Linux), blocks in arenas: shared memory that the kernel frees.

pool: the driver's side. main: a worker process. arena: the memory and who may reuse it. store: a worker's view of
blocks. wire: framing and passed descriptors. Importing any of them does nothing that only Linux can do.
"""
