"""Answer questions over HTTP: requests enter, answers leave, and a page asks them.

This folder bounds and checks requests, gathers them into batches and reports on itself. It knows
nothing of prompts or of the command line.
"""
