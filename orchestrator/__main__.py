"""`python -m orchestrator` is `terrane`."""

from orchestrator.cli import main

if __name__ == "__main__":
    main()
