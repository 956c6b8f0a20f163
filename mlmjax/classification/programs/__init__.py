"""Write classifiers as compiled programs that run without this package.

A classifier enters; a folder leaves. This folder never trains and evaluates nothing.
"""
