"""The benchmarks: ``fastunet bench`` runs them; see :mod:`fastunet.benchmarks.suite`.

Each call is held to the parity rule first, then timed beside its peers, in the same run as the
machine's limits. Scripts that need a clone say so.
"""
