"""`python -m bench`."""

from bench import signals
from bench.cli import main

if __name__ == "__main__":
    signals.listen()
    main()
