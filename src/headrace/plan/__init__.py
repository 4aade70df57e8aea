"""Logical plan, rules, stages and fingerprints. No clock, no threads; I/O only where a fingerprint reads code and model files."""
