"""Choose which tokens of one example are masked, in numpy.

Ids of one example and a random generator enter; positions leave. This folder knows no files, no
rows and no batches.
"""
