"""Turn files into examples: read sources, check answers, exclude evaluation sets.

Files enter; tokenised examples leave, one at a time. This folder never loads jax and never writes
a file.
"""
