"""Workers as processes of this machine (Linux), blocks in arenas: shared memory that the kernel frees.

pool: the driver's side. ledger: its account of blocks. main: a worker process. arena: the memory and who may reuse it.
store: a worker's view of blocks. wire: framing and passed descriptors. spawn: starting a process. forks, fork_server: forking
it instead, and the process that does. crumb, stacks: what a worker leaves for whoever finds it dead. Importing any of them does
nothing that only Linux can do.
"""
