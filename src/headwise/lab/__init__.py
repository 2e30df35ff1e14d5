"""The laboratory: fair comparisons of architectures, their statistics and their reports.

Nothing is imported here: `headwise.lab.result` and `headwise.lab.stats` load without torch, the report without torch too.
"""
