"""`python -m mlmjax` is the `mlmjax` command."""

from mlmjax.cli.main import main

if __name__ == "__main__":
    main()
