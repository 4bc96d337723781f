"""One report of one or several runs: a self-contained HTML page, the same as Markdown, and JSON."""
