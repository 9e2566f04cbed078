"""Commands as a user calls them, and what they cost."""

import resource
import subprocess


def called(arguments, **options):
    """(process, seconds): of processor time, as the clock also tells what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
