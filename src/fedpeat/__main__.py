"""Run the command line with ``python -m fedpeat``."""

from fedpeat.cli.main import main

if __name__ == "__main__":
    main()
