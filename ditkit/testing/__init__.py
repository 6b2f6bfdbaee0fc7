"""The contract tests, importable: whatever is registered gets them.

In a test module of any package::

    from ditkit.testing.contract import *        # every registered backbone and method, and all pairs

A backbone brings ``tiny()`` and ``example()``, a method ``tiny()`` and ``off()``; nothing else is written for them.
"""
