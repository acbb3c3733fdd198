"""What `docs/generate_benchmarks.py` measures: one module for each part of the page.

Each has a small dataclass of plain numbers, `measure(...)`, which finds them, and `told(...)`,
which says them in Markdown.
"""
