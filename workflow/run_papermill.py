"""papermill, as its command, but quicker to start.

For a check of addresses that notebooks do not need, jsonschema imports a grammar that takes over a second to build.
"""

import sys

sys.modules["rfc3987_syntax"] = None  # importing it now raises ImportError, which jsonschema expects

if __name__ == "__main__":
    from papermill.cli import papermill

    sys.exit(papermill())
