"""What the engine needs of CUDA: device memory that processes share, and shares of the multiprocessors.

Nothing here imports CuPy, cuda-bindings or torch before it is used: every module can be imported, and all of
its bookkeeping tested, on a machine without a GPU.
"""
