"""The studio: pages in a browser over the same functions that the command line calls.

Only this package imports gradio (the extra `ui`). The command line asks it for `app.serve` and nothing else,
which settles gradio before it imports the pages.
"""
