"""What a terminal sees: commands, exit codes, messages, the demo.

Arguments enter; results go to standard output, everything else to standard error.
"""
