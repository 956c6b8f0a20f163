"""Answer typed questions about a text or JSON: questions enter, probabilities of answers leave.

This folder words questions as prompts, scores them, calibrates, fine-tunes, and reads and writes
their JSON. It knows nothing of tasks, HTTP or the command line.
"""
