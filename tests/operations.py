"""How much the tests of random operations do: the same each time, or TQAI_OPERATIONS=100000 for about so many new ones.

pytest's summary says how many there were, by what they were done on.
"""

import os
from collections import Counter

MORE = int(os.environ.get("TQAI_OPERATIONS", "0"))
done: Counter[str] = Counter()


def sized(share: float, examples: int, **more):
    """Settings for so many examples, or for this share of MORE operations. A failure prints how to run it again."""
    from hypothesis import HealthCheck, settings  # not with the module, which every test run has by conftest.py

    more |= {"deadline": None, "print_blob": True, "suppress_health_check": list(HealthCheck), "database": None}
    return settings(max_examples=max(1, int(MORE * share)) if MORE else examples, derandomize=not MORE, **more)
