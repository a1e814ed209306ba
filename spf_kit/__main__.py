"""`python -m spf_kit` is `spf-kit`."""

from spf_kit.cli import main

if __name__ == "__main__":
    main()
