"""Say which words of a text made a classifier answer as it did.

A classifier and texts enter; the importance of each word leaves. This folder never trains.
"""
