"""`python -m sparse_bwd`: the command line."""

from sparse_bwd.cli import main

if __name__ == "__main__":
    main()
