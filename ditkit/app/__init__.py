"""``ditkit app``: a page that samples a bundle and shows the base and an accelerated pipeline side by side.

``jobs`` (one thread does all the work), ``studio`` (bundles and methods), ``compare`` (what is run, in which order, and what is
timed), ``pictures``, ``cards`` (what the page shows, as HTML), ``page`` (the Gradio page), ``server``. Only the last two know Gradio.
"""
