"""The classifier: labels and texts in, labels and probabilities out.

This room builds prompts, scores them, calibrates and fine-tunes. It knows nothing of tasks, suites
or the command line.
"""
