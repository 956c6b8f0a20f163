"""Tasks and their results: a model is evaluated, reported on and compared.

A model and a task enter; a result folder leaves.
"""
