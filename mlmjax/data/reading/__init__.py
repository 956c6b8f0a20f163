"""From files to examples: sources are read, answers checked, evaluation sets excluded.

Files enter; tokenised examples leave, one at a time. This room never loads jax and writes no files.
"""
