"""Logical plan, rules, stages, fingerprints. No clock, no threads; I/O only where a fingerprint reads code and model files."""
