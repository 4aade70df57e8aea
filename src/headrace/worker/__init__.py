"""What runs in a worker: the program, its operators, cursors and batches. The same code on every substrate."""
