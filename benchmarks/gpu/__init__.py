"""The parts of `gpu_check.py`: what the kernels' results are worth, how fast they come, and the models on the GPU."""
