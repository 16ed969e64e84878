"""Throughput benchmark: ``python -m bench cpu``. Uses only what a user calls, of ours and of every peer."""
