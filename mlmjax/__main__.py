"""`python -m mlmjax` is the `mlmjax` command."""

from mlmjax.cli.commands import main

if __name__ == "__main__":
    main()
