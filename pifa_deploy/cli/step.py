"""`python -m pifa_deploy.cli.step COMMAND ...` is `pifa-deploy COMMAND ...` that does not outlive who started it."""

from __future__ import annotations

import signal

from pifa_deploy.child_process import end_with_parent

if __name__ == "__main__":
    end_with_parent(signal.SIGTERM)  # which the command line takes like Ctrl-C: it cleans up
    # Importing it takes seconds, in which whoever started this may die.
    from pifa_deploy.cli.main import main

    main()
