"""Pure functions from leases to kernel state: one small file for each backend.

Nothing here does I/O, reads a clock, logs, or imports another backend; a backend returns records, never sends them.
"""
