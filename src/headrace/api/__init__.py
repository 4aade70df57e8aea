"""The public verbs. `dataset` builds plans, `read` starts them, `session` wires the concrete parts and runs them."""
