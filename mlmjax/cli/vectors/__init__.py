"""Embed the texts of a file, line by line or row by row.

Lines or tables enter; a file of vectors leaves. This folder knows nothing of labels.
"""
