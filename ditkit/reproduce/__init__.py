"""Experiments: a paper's central claim in miniature, against its baseline, with a verdict. ``ditkit reproduce NAME``.

A protocol (``ditkit/recipes/reproduce/NAME.yaml``) says what is compared, how it is judged and how small an effect can be seen;
it is committed before the first run. ``runner`` trains the bases (once, by content hash), measures each arm for each seed and
judges the claims: shown, not shown or underpowered.
"""

from __future__ import annotations
