"""The commands that read tables: `fit` and `classify`.

Names of files and columns enter; a saved classifier with its report, or answers row by row, leave.
This folder knows nothing of how files are parsed or models are trained.
"""
