"""Many devices and many processes: the mesh, the sharding rules, and joining a run.

A mesh configuration enters; shardings and values that all processes agree on leave. This folder
knows nothing of models or data.
"""
