"""Read formats of data files that can be written in several ways, such as CSV.

Lines enter; rows of fields leave, and what was found out about a file is logged. This folder knows
nothing of records and examples, and never loads jax.
"""
