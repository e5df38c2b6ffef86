"""``python -m fusechat``: the command line."""

from fusechat.cli import main

if __name__ == "__main__":
    main()
