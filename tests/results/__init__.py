"""The experiments behind docs/results.md: each runs the project's own jobs, or goes on with runs
that are there, and reads nothing but the files that they left.

python -m tests.results.all --seeds 0 1 2 --runs FOLDER
"""
