"""`python -m clipfast` is the command line."""

from clipfast.cli import main

main()
