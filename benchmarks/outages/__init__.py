"""Faults that are injected into a service under load, beside an upstream that keeps its own bill."""
