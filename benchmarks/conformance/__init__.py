"""Adapters of other libraries: `sslkit conform benchmarks.conformance.lightly`."""
