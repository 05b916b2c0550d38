"""What the engine needs of CUDA: device memory that processes share, and shares of the multiprocessors.

Nothing here imports CuPy or cuda-bindings before it is used: every module can be imported, and all of its
bookkeeping tested, on a machine without a GPU. torch is for the runner and what it is made of, which only
executors import; what a worker imports does without.
"""
