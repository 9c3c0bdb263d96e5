#!/usr/bin/env python
"""Django's command line for the sample project."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command that was asked for."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "sample.settings")
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)


# Worker processes that multiprocessing spawns import this file once more.
if __name__ == "__main__":
    main()
