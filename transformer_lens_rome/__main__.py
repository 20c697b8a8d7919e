"""Command line: `python -m transformer_lens_rome COMMAND`; `--help` lists the commands."""

import sys

from transformer_lens_rome.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
