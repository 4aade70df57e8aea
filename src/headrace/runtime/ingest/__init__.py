"""Training ingest: one run of a pipeline, dealt out to n consumers, epoch after epoch. The modules, each above what it uses:

meeting      how the ranks of one torchrun job find the one that serves
server       serves a hub to other processes of this machine over a Unix socket; and the channel of its own process
client       the channel of those
wire         what server and client say to each other
private      the folder of this user's sockets
hub          the coordinator under a lock, with the run that feeds it
coordinator  who is in which epoch, and which rows are whose: pure, deals in opaque blocks and ranges of their rows
channel      what a consumer needs of whatever carries blocks to it (Protocols), and fetching ahead
"""
