"""Every registered backbone and method, from this package and from the example plugin, gets the shared contract tests."""

from ditkit.testing.contract import *  # noqa: F403
