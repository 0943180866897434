"""`python -m launcher` is `mega`."""

import sys

if __name__ == "__main__":
    if sys.argv[1:] == ["agent"]:
        from launcher.verbs.agent import main
    else:
        from launcher.cli import main
    main()
