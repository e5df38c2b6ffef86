"""``python -m kd_trilateral``: the command line."""

from kd_trilateral.cli import main

if __name__ == "__main__":
    main()
