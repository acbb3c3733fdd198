"""Stub."""
ENTRIES = ()
