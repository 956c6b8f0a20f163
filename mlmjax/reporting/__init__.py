"""How anything is shown to people: Markdown, pages, pictures, lines and progress bars.

Numbers and text enter; text that no input can break, pictures and terminal output leave. This
folder knows nothing of what it reports on. Only `charts` and `accuracy` load matplotlib.
"""
