"""The composition root: a CPOConfig becomes records, batches, a policy, a trainer, a run directory.

Only this room and the command line see the whole configuration; what they call takes plain
arguments.
"""
