"""The command line: `python -m cachekit`."""

from cachekit.cli import app

app(prog_name="cachekit")
