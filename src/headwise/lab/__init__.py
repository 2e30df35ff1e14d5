"""The laboratory: fair comparisons of architectures, their statistics and their reports.

Nothing is imported here, so that results can be read, judged and drawn without loading torch.
"""
