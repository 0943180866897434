"""`python -m launcher` is `mega`."""

from launcher.cli import main

if __name__ == "__main__":
    main()
