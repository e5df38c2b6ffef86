"""``python -m fusion_core`` is the ``fusion`` command."""

from fusion_core.command import main

if __name__ == "__main__":
    main()
