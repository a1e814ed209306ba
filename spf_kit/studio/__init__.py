"""The studio: pages in a browser over the same functions that the command line calls.

Only this package imports gradio (the extra `ui`), and only inside functions: the command line asks it for
`app.serve` and nothing else.
"""
